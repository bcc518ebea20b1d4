"""Names and ids that people type: one of a resource's id, its name, or the first characters of its id."""

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

from interplay.calls.collections import Collection, is_id, noun_of
from interplay.client import Client, ProblemError
from interplay.command import rendering
from interplay.command.options import note
from interplay.command.values import UsageError


def given_name(_type: Any, tokens: Sequence[Token]) -> str:
    """Convert an option's text to a name or an id, which no empty text is."""
    text = tokens[0].value
    if not text.strip():
        raise ValueError("an empty text is no name and no id")
    return text


Named = Annotated[str, Parameter(metavar="NAME|ID", converter=given_name)]
NamedOption = Annotated[str | None, Parameter(metavar="NAME|ID", converter=given_name)]


def id_of(client: Client, collection: Collection, text: str, option: str | None = None) -> str:
    """Return the id of the resource that a text names; of several with one name the newest, which a note says.

    Args:
        client: of the service.
        collection: where it is looked for.
        text: a whole id, which is not looked up; a name; or the first characters of an id.
        option: that gave the text.

    Raises:
        UsageError: there is none, or these characters begin several ids.
    """
    if is_id(text):
        return text
    return str(found_by(client, collection, text, option)["id"])


def found_by(client: Client, collection: Collection, text: str, option: str | None = None) -> Any:
    """Return the resource that a text names, as `id_of` does its id."""
    found = client.find_all(collection, text)
    if not found:
        known = f"`interplay list {collection}` shows those that there are"
        raise UsageError(f"there is no {noun_of(collection)} with the name or id {text!r}; {known}", option)
    if len(found) > 1:
        require_name(found, text, option)
        newest = found[0]
        shown = rendering.printable(text)
        note(f"Several {collection} have the name {shown}; the newest is {newest['id']}, of {_when(newest)}.")
    return found[0]


def run_of(client: Client, text: str) -> tuple[Collection, Any]:
    """Return what a text names that can be waited for and cancelled: an analysis or a fetch, and which of the two.

    A fetch has the name of what it makes, and an analysis that of its checkpoint: of both the newest is meant.

    Raises:
        UsageError: there is none, or these characters begin several ids.
    """
    collections: tuple[Collection, ...] = ("analyses", "fetches")
    if is_id(text):
        found = [(collection, row) for collection in collections if (row := _with_id(client, collection, text))]
    else:
        found = [(collection, row) for collection in collections for row in client.find_all(collection, text)]
    found.sort(key=lambda entry: (entry[1].get("name") == text, str(entry[1].get("created_at"))), reverse=True)
    if not found:
        known = "`interplay list analyses` and `interplay list fetches` show those that there are"
        raise UsageError(f"there is no analysis and no fetch with the name or id {text!r}; {known}")
    collection, newest = found[0]
    if len(found) > 1:
        require_name([row for _, row in found], text)
        shown, noun = rendering.printable(text), noun_of(collection)
        note(f"Several have the name {shown}; the newest is the {noun} {newest['id']}, of {_when(newest)}.")
    return collection, newest


def _with_id(client: Client, collection: Collection, id_: str) -> Any:
    """Return a resource by its whole id; None if the collection has none."""
    try:
        return client.get(collection, id_)
    except ProblemError as error:
        if error.status != 404:
            raise
        return None


def require_name(found: Sequence[Any], text: str, option: str | None = None) -> None:
    """Raise UsageError if several resources were found by the first characters of their ids, not by their name."""
    if found[0].get("name") != text:
        ids = " and ".join(str(one["id"]) for one in found)
        raise UsageError(f"{text!r} begins several ids, such as {ids}: give more characters", option)


def _when(resource: Any) -> str:
    return rendering.printable(str(resource["created_at"])[:19].replace("T", " "))
