"""Calls that every collection has: get, list and delete; and the transport that all calls share."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

from interplay.results import Analysis, Baseline, Checkpoint, FeatureSet, Fetch, GateSummary, Probe, ReportSummary
from interplay.transport import Body, InterplayError, ProblemError, Transport, segment

Collection = Literal["checkpoints", "probes", "feature-sets", "fetches", "analyses", "reports", "gates", "baselines"]
_ID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
_BEGINNING = re.compile(r"[0-9a-f-]{4,36}")


class NotOne(InterplayError):
    """No resource, or more than one, has this name or an id that begins so."""


class Filters(TypedDict, total=False):
    """The filters of `list`; those that are None are left out.

    `id`, the first characters of an id, `name`, `search`, a part of a name, `created_after`, `created_before` and
    `metadata` are for every collection; `kind`, `checkpoint_id`, `probe_id` and `feature_set_id` for analyses and
    reports; `status` for analyses and fetches. `sort`, in `order` desc (the default) or asc, is for reports the path of
    a metric such as splits.test.accuracy, and for checkpoints, probes and feature sets a column or metadata.KEY. For
    reports: `metric`, bounds such as splits.test.accuracy>=0.9; `show`, paths of metrics that each report's `metrics`
    shall have.
    """

    id: str | None
    name: str | None
    search: str | None
    created_after: datetime | str | None
    created_before: datetime | str | None
    metadata: Mapping[str, Any] | None
    kind: str | None
    checkpoint_id: str | None
    probe_id: str | None
    feature_set_id: str | None
    status: str | None
    sort: str | None
    order: Literal["asc", "desc"] | None
    metric: Sequence[str] | None
    show: Sequence[str] | None


class Page(Filters, total=False):
    """The arguments of `list`: filters, the most resources to yield, and the resources per request."""

    limit: int | None
    page_size: int


class CollectionCalls:
    """Calls that every collection has."""

    _transport: Transport

    def get(self, collection: Collection, resource_id: str) -> Body:
        """Return one resource of a collection."""
        return self._call("GET", f"/v1/{collection}/{segment(resource_id)}", repeatable=True)

    def find(self, collection: Collection, resource: str) -> Body:
        """Return a resource by its id, by its name, of several the newest, or by the first characters of its id.

        Raises:
            NotOne: there is none, or these characters begin several ids.
        """
        found = self.find_all(collection, resource)
        if not found:
            raise NotOne(f"There is no {noun_of(collection)} with the name or id {resource!r}.")
        if len(found) > 1 and found[0].get("name") != resource:
            ids = " and ".join(str(one["id"]) for one in found)
            raise NotOne(f"{resource!r} begins the ids of several {collection}, such as {ids}.")
        return found[0]

    def find_all(self, collection: Collection, resource: str, limit: int = 2) -> Sequence[Body]:
        """Return the resources that `find` would choose from, newest first.

        Args:
            collection: as for `list`.
            resource: an id, a name, or four or more of an id's first characters.
            limit: the most to return.
        """
        if is_id(resource):
            try:
                return [self.get(collection, resource)]
            except ProblemError as error:
                if error.status != 404:
                    raise
        named: Sequence[Body] = [*self.list(collection, name=resource, limit=limit)]
        if named or not _BEGINNING.fullmatch(resource):
            return named
        return [*self.list(collection, id=resource, limit=limit)]

    def download(self, collection: Collection, resource_id: str, path: str | Path) -> Body:
        """Write the stored file of a checkpoint, probe or feature set, and return the resource.

        The file appears once it is whole, and its hash is that of the resource.

        Raises:
            InterplayError: the bytes that came are others.
            OSError: the file cannot be written.
        """
        resource = self.get(collection, resource_id)
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        digest = hashlib.sha256()
        try:
            with part.open("wb") as file:
                for chunk in self._transport.chunks(f"/v1/{collection}/{segment(resource_id)}/file"):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != resource["sha256"]:
                raise InterplayError(
                    f"The file that came has the sha256 {digest.hexdigest()}, not {resource['sha256']}."
                )
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return resource

    def delete(self, collection: Collection, resource_id: str) -> None:
        """Delete a resource; what a baseline or an analysis that has not ended needs is refused.

        Args:
            collection: checkpoints, probes, feature-sets, reports; analyses, which take their reports along; gates, of
                which all versions go; or baselines, which go with their history.
            resource_id: its id; of a gate that of any version; of a baseline its name.

        Raises:
            ProblemError: status 409 if it is needed (`in-use`: `baselines`, `analysis_ids` or `checkpoint_ids` say by
                what), or is an analysis that has not ended (`not-ended`).
        """
        retries = self._transport.retries()
        try:
            self._transport.send("DELETE", f"/v1/{collection}/{segment(resource_id)}", repeatable=True, retries=retries)
        except ProblemError as error:
            # The first attempt deleted it, and its response was lost.
            if not (error.status == 404 and retries.used):
                raise

    @overload
    def list(self, collection: Literal["checkpoints"], **page: Unpack[Page]) -> Iterator[Checkpoint]: ...
    @overload
    def list(self, collection: Literal["probes"], **page: Unpack[Page]) -> Iterator[Probe]: ...
    @overload
    def list(self, collection: Literal["feature-sets"], **page: Unpack[Page]) -> Iterator[FeatureSet]: ...
    @overload
    def list(self, collection: Literal["fetches"], **page: Unpack[Page]) -> Iterator[Fetch]: ...
    @overload
    def list(self, collection: Literal["analyses"], **page: Unpack[Page]) -> Iterator[Analysis]: ...
    @overload
    def list(self, collection: Literal["reports"], **page: Unpack[Page]) -> Iterator[ReportSummary]: ...
    @overload
    def list(self, collection: Literal["gates"], **page: Unpack[Page]) -> Iterator[GateSummary]: ...
    @overload
    def list(self, collection: Literal["baselines"], **page: Unpack[Page]) -> Iterator[Baseline]: ...
    def list(self, collection: Collection, **page: Unpack[Page]) -> Iterator[Any]:
        """Yield the resources of a collection that match the filters, newest first unless sorted, page by page.

        Args:
            collection: checkpoints, probes, feature-sets, fetches, analyses, reports, gates or baselines.
            page: `limit`, the most resources to yield (default: all), and `page_size`, resources per request (default:
                100). The filters `id`, `name`, `search`, `created_after`, `created_before` and `metadata` (for each key
                a value, or a list of values, all of which a resource must have); for analyses and reports `kind`,
                `checkpoint_id`, `probe_id`, `feature_set_id`; for analyses and fetches `status`; for checkpoints,
                probes and feature sets `sort`, `order`; for reports `metric`, `show`.
        """
        left, page_size = page.pop("limit", None), page.pop("page_size", 100)
        query = _query(page)
        while left is None or left > 0:
            query["limit"] = page_size if left is None else min(page_size, left)
            found = self._call("GET", f"/v1/{collection}", params=query, repeatable=True)
            yield from found["items"]
            if not found["next_cursor"]:
                return
            left = None if left is None else left - len(found["items"])
            query["cursor"] = found["next_cursor"]

    def _call(self, method: str, path: str, **request: Any) -> Body:
        return self._transport.call(method, path, **request)


def is_id(text: str) -> bool:
    """Return whether a text is a whole id."""
    return _ID.fullmatch(text) is not None


def noun_of(collection: Collection) -> str:
    """Return what one resource of a collection is called."""
    irregular = {"analyses": "analysis", "fetches": "fetch"}
    return irregular.get(collection) or collection.removesuffix("s").replace("-", " ")


def given(values: Mapping[str, Any]) -> Body:
    """Return the members that are not None."""
    return {key: value for key, value in values.items() if value is not None}


def _query(filters: Filters) -> dict[str, Any]:
    """Return filters as the parameters of a request."""
    metadata = filters.pop("metadata", None) or {}
    query: dict[str, Any] = {
        # A time without a zone is local time, as in Python; the service needs the zone.
        key: value.astimezone().isoformat() if isinstance(value, datetime) else value
        for key, value in given(filters).items()
    }
    query["metadata"] = [
        f"{key}={_metadata_text(value)}"
        for key, values in metadata.items()
        for value in (values if isinstance(values, list | tuple) else [values])
    ]
    return query


def _metadata_text(value: Any) -> str:
    """Return a metadata value as the service's filters compare it: `final=true`, `epoch=10`, `run=a`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)
