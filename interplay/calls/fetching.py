"""Calls that have the service fetch files from where they lie: begin a fetch, look at it, wait for it, cancel it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Unpack, cast, overload
from urllib.parse import unquote

from interplay.calls.collections import CollectionCalls, given
from interplay.calls.descriptions import CheckpointDescription, ProbeDescription, checkpoint_spec, probe_spec
from interplay.results import Fetch, SucceededFetch
from interplay.transport import Body, FetchFailed, segment
from interplay.waiting import poll_fetch

# In any case of letters: the service says how they are written, and no file is meant.
_SOURCE = re.compile(r"(s3|gs|az|hf|https?)://", re.IGNORECASE)
# A folder's name may end in a version, as net-v1.0 does, and that is no suffix.
_SUFFIX = re.compile(r"(\.safetensors\.index\.json|\.[A-Za-z]\w*)$")
_LONGEST_NAME = 200


class FetchingCalls(CollectionCalls):
    """Calls that have the service fetch files from where they lie."""

    @overload
    def create_fetch(
        self,
        collection: Literal["checkpoints"],
        source: str,
        *,
        name: str,
        sha256: str | None = None,
        **described: Unpack[CheckpointDescription],
    ) -> Fetch: ...
    @overload
    def create_fetch(
        self,
        collection: Literal["probes"],
        source: str,
        *,
        name: str,
        sha256: str | None = None,
        **described: Unpack[ProbeDescription],
    ) -> Fetch: ...
    def create_fetch(
        self, collection: Literal["checkpoints", "probes"], source: str, *, name: str, **described: Any
    ) -> Fetch:
        """Have a file fetched that lies elsewhere, and return at once; `wait_for_fetch` waits.

        As long as the same is being fetched, the same call returns the same fetch.

        Args:
            collection: what the file becomes: checkpoints or probes.
            source: its address (docs/sources.md).
            name: display name of the resource.
            described: the arguments of `push_checkpoint` or `push_probe`, and `sha256`, which the file must have.
        """
        sha256 = described.pop("sha256", None)
        spec = self._fetch_spec(collection, name, described)
        # Repeatable: a request whose answer was lost is answered with the fetch that it has begun.
        body = given({**spec, "source": source, "sha256": sha256})
        return cast(Fetch, self._call("POST", f"/v1/{collection}", json=body, repeatable=True))

    def get_fetch(self, fetch_id: str) -> Fetch:
        """Return the state of a fetch."""
        return cast(Fetch, self._call("GET", f"/v1/fetches/{segment(fetch_id)}", repeatable=True))

    def wait_for_fetch(
        self,
        fetch_id: str,
        *,
        timeout_seconds: float | None = None,
        on_progress: Callable[[Fetch], None] | None = None,
    ) -> SucceededFetch:
        """Block until a fetch has succeeded, and return it; `resource_id` is what the file has become.

        The service is asked five times a second at first, then once. The wait survives a restart of the service that is
        no longer than calls are retried.

        Args:
            fetch_id: id of the fetch.
            timeout_seconds: give up after this time; the fetch continues.
            on_progress: called with each received state of the fetch.

        Raises:
            FetchFailed: it failed or was cancelled.
            WaitTimeout: the timeout has passed.
        """
        for state in poll_fetch(self._transport, fetch_id, timeout_seconds=timeout_seconds):
            if on_progress is not None:
                on_progress(cast(Fetch, state))
            if state["status"] == "succeeded":
                return cast(SucceededFetch, state)
            if state["status"] in ("failed", "cancelled"):
                raise FetchFailed(state)
        raise AssertionError("states are polled until the time is up, which raises")

    def cancel_fetch(self, fetch_id: str) -> Fetch:
        """Stop a fetch within seconds, unless its file goes to the storage now, and remove what has come."""
        return cast(Fetch, self._call("POST", f"/v1/fetches/{segment(fetch_id)}/cancel", repeatable=True))

    def _fetched(
        self,
        collection: Literal["checkpoints", "probes"],
        source: str,
        name: str,
        described: CheckpointDescription | ProbeDescription,
        on_progress: Callable[[int, int], None] | None,
    ) -> Body:
        """Have a file fetched and return the resource that it has become."""

        def tell(fetch: Fetch) -> None:
            """Pass the bytes on, once the source has said how many there are."""
            if on_progress is not None and fetch["progress"]["total"]:
                on_progress(fetch["progress"]["done"], fetch["progress"]["total"])

        fetch = cast(Any, self.create_fetch)(collection, source, name=name, **described)
        return self.get(collection, self.wait_for_fetch(fetch["id"], on_progress=tell)["resource_id"])

    @staticmethod
    def _fetch_spec(collection: str, name: str, described: Mapping[str, Any]) -> Body:
        if collection == "checkpoints":
            return checkpoint_spec(name, cast(CheckpointDescription, described))
        return probe_spec(name, cast(ProbeDescription, described))


def source_of(path: str | Path) -> str | None:
    """Return a text that is the address of a file elsewhere; None of a path, which a `Path` always is."""
    return path if isinstance(path, str) and _SOURCE.match(path) else None


def name_of(source: str) -> str:
    """Return a name for what lies at an address: its last part without a suffix; of the Hub the repository's."""
    scheme, _, rest = source.partition("://")
    if scheme.lower() == "hf":
        _organisation, _, repository = rest.removeprefix("datasets/").partition("/")
        name = repository.partition("/")[0].partition("@")[0]
    else:
        rest = unquote(re.split("[?#]", rest)[0]) if scheme.lower().startswith("http") else rest
        name = rest.rstrip("/").rpartition("/")[2]
        # What ends with a slash is a folder, and the first part is a bucket or a host: neither has a suffix.
        name = name if rest.endswith("/") or "/" not in rest else _SUFFIX.sub("", name)
    return name[:_LONGEST_NAME] or source[:_LONGEST_NAME]
