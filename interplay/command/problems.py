"""Problems of the service in the words of the command: its options in place of members of a request."""

from collections.abc import Mapping
from typing import Any

from interplay.client import ProblemError


def in_our_words(error: ProblemError) -> tuple[str, str, Mapping[str, Any]]:
    """Return the title, the detail and the further members of a problem."""
    members = dict(error.members)
    if error.status == 401:
        return error.title, "Give it with --api-key KEY, or in the variable INTERPLAY_API_KEY.", members
    if error.type.endswith(":source-not-allowed"):
        beginning = _beginning_of(str(members.get("address", "")))
        detail = (
            f"The operator allows addresses by listing how they begin, for example INTERPLAY_SOURCES={beginning} "
            "beside what is listed, in the environment of the service and of its workers (docs/sources.md)."
        )
        return error.title, detail, members
    if (role := members.pop("missing_role", None)) is not None:
        columns = ", ".join(repr(name) for name in members.pop("columns", []))
        detail = f"No column has a usual name for {role}s; the file has {columns}. Name it: --column {role}=NAME."
        if role == "label" and members.pop("labels_optional", False):
            detail += " Texts without labels, for language models: --column label=."
        return error.title, detail, members
    if "columns" in members:
        return error.title, f"{error.detail} Name one with --column ROLE=NAME.", members
    if members.pop("missing_member", None) == "architecture":
        detail = (
            "The file does not describe its network. Give --architecture, a JSON file or JSON such as "
            '\'{"family": "builtin", "name": "mlp", "args": {"sizes": [64, 32, 10]}}\'.'
        )
        return error.title, detail, members
    return error.title, error.detail, members


def _beginning_of(address: str) -> str:
    """Return the bucket, the host or the organisation of an address."""
    scheme, _, rest = address.partition("://")
    n_parts = 2 if scheme == "hf" and rest.startswith("datasets/") else 1
    return f"{scheme}://{'/'.join(rest.split('/')[:n_parts])}"
