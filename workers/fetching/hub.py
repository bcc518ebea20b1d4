"""Repositories of the Hugging Face Hub, or of a mirror, by its HTTP API: which files a revision has, then the files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

import httpx

from app.errors import SourceMissing, SourceUnavailable
from app.files.names import unsafe
from app.sources import Allowed, Source, parse_source
from workers.fetching import web
from workers.fetching.origins import MOST_FILES, Found, Interrupted, Remote, around_index, is_index

OFFICIAL = "https://huggingface.co"
# Where the Hub itself keeps large files: it redirects to these.
_STORES = ("hf.co", "huggingface.co")
_MAX_ANSWER_BYTES = 32 * 2**20


def reach_of(hub_url: str, allowed: tuple[Allowed, ...]) -> web.Reach:
    """Return where requests for files of the Hub may go: to it, to its own stores, and where other entries allow it."""
    hub, elsewhere = parse_source(hub_url), web.reach_of(allowed, own=None)

    def reach(source: Source) -> web.Reached | None:
        if (source.scheme, source.place) == (hub.scheme, hub.place):
            # The operator has given its address.
            return web.Reached(inside=True, with_token=True)
        if hub_url == OFFICIAL and source.scheme == "https" and source.place.endswith(tuple(f".{s}" for s in _STORES)):
            return web.Reached(inside=False, with_token=False)
        return elsewhere(source)

    return reach


class Hub:
    """A repository, at the commit that its revision names now.

    Args:
        source: the address.
        hub_url: of the Hub.
        client: of `web.client_for`.
    """

    def __init__(self, source: Source, hub_url: str, client: httpx.Client) -> None:
        self._source, self._hub_url, self._client = source, hub_url, client

    def look(self) -> Found:
        """Return the file of the address's path, or the files of the repository, or of the folder that it names."""
        answer = self._ask()
        commit = answer.get("sha")
        if not isinstance(commit, str) or not commit.isalnum():
            raise SourceUnavailable(f"The Hub's answer on {self._source.shown} names no commit.")
        path = self._source.path.rstrip("/")
        below: dict[PurePosixPath, Mapping[str, Any]] = {}
        for name, entry in _files(answer).items():
            if name == path and not is_index(name):
                return Found(self._remote(commit, name, PurePosixPath(name).name, entry), {}, commit)
            folder = path.rpartition("/")[0] if is_index(path) else path
            if not folder or name.startswith(f"{folder}/"):
                below[PurePosixPath(name.removeprefix(f"{folder}/" if folder else ""))] = {**entry, "name": name}
        if not below or (is_index(path) and PurePosixPath(path).name not in map(str, below)):
            raise SourceMissing(f"The repository has no {path!r} at the commit {commit}.", revision=commit)
        files = {
            inside: self._remote(commit, entry["name"], str(inside), entry)
            for inside, entry in below.items()
            if inside.suffix in (".json", ".safetensors") or _size(entry) is not None
        }
        found = around_index(files, PurePosixPath(path).name) if is_index(path) else files
        return Found(None, found, commit)

    def read(self, file: Remote, begin: int, end: int) -> Iterator[bytes]:
        return web.read_range(self._client, file, begin, end, pinned=True)

    def close(self) -> None:
        self._client.close()

    def _ask(self) -> dict[str, Any]:
        place, revision = self._source.place, quote(self._source.revision or "main", safe="")
        kind = "" if place.startswith("datasets/") else "models/"
        url = f"{self._hub_url}/api/{kind}{place}/revision/{revision}?blobs=true"
        try:
            answer = json.loads(web.answer(self._client, url, self._source.shown, _MAX_ANSWER_BYTES))
        except (ValueError, RecursionError):
            raise Interrupted("the Hub's answer is not JSON") from None
        if not isinstance(answer, dict):
            raise Interrupted("the Hub's answer is not a JSON object")
        return answer

    def _remote(self, commit: str, path: str, name: str, entry: Mapping[str, Any]) -> Remote:
        """Return a file. A commit never changes, so that the bytes of a range need no further mark."""
        url = f"{self._hub_url}/{self._source.place}/resolve/{commit}/{quote(path)}"
        size_bytes = _size(entry)
        if size_bytes is None:
            # A mirror that does not tell sizes.
            size_bytes = web.probe(self._client, url, f"{self._source.shown} ({path})").size_bytes
        large = entry.get("lfs")
        sha256 = large.get("sha256") if isinstance(large, dict) else None
        sha256 = sha256 if isinstance(sha256, str) and len(sha256) == 64 else None
        mark = sha256 or entry.get("blobId")
        mark = mark if isinstance(mark, str) else commit
        return Remote(name, url, size_bytes, mark, identity=commit, sha256=sha256)


def _files(answer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    siblings = answer.get("siblings")
    if not isinstance(siblings, list) or len(siblings) > MOST_FILES:
        raise SourceMissing(f"The Hub lists no files of the repository, or more than {MOST_FILES}.")
    files: dict[str, Mapping[str, Any]] = {}
    for entry in siblings:
        name = entry.get("rfilename") if isinstance(entry, dict) else None
        if isinstance(name, str) and unsafe(name) is None:
            files[name] = entry
    return files


def _size(entry: Mapping[str, Any]) -> int | None:
    size = entry.get("size")
    return size if type(size) is int and size >= 0 else None
