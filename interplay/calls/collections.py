"""Calls that every collection has: get, list and delete; and the transport that all calls share."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, TypedDict, Unpack, cast, overload

from interplay.results import Analysis, Baseline, Checkpoint, FeatureSet, GateSummary, Probe, ReportSummary
from interplay.transport import Body, ProblemError, Transport, segment

Collection = Literal["checkpoints", "probes", "feature-sets", "analyses", "reports", "gates", "baselines"]


class Filters(TypedDict, total=False):
    """The filters of `list`; those that are None are left out.

    `name`, `created_after`, `created_before` and `metadata` are for every collection; `kind`, `checkpoint_id`,
    `probe_id` and `feature_set_id` for analyses and reports; `status` for analyses. For reports: `sort` by the metric
    at a path such as splits.test.accuracy, in `order` desc (the default) or asc; `metric`, bounds such as
    splits.test.accuracy>=0.9; `show`, paths of metrics that each report's `metrics` shall have.
    """

    name: str | None
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

    def find_probe(self, probe: str) -> Probe:
        """Return a probe by its name, the newest of several, or by its id."""
        for found in self.list("probes", name=probe, limit=1):
            return found
        return cast(Probe, self.get("probes", probe))

    def delete(self, collection: Collection, resource_id: str) -> None:
        """Delete a checkpoint, probe or feature set that no analysis needs."""
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
            collection: checkpoints, probes, feature-sets, analyses, reports, gates or baselines.
            page: `limit`, the most resources to yield (default: all), and `page_size`, resources per request (default:
                100). The filters `name`, `created_after`, `created_before` and `metadata` (for each key a value, or a
                list of values, all of which a resource must have); for analyses and reports `kind`, `checkpoint_id`,
                `probe_id`, `feature_set_id`; for analyses `status`; for reports `sort`, `order`, `metric`, `show`.
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
