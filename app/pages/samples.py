"""Samples of probes: a page of their own, and an address for each picture. docs/decisions/0058 says why."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool

from app import models, resources, schemas
from app.api.routes import Service, ServiceDep
from app.database import read
from app.errors import NotFound, Unavailable
from app.files.sampling import CLASSES, PICTURES, Asked, Sample, Samples, is_picture, limits_of, read_apart
from app.pages import words
from app.pages.rendering import page, size
from app.pages.visitors import VisitorDep
from app.schemas.base import MAX_CLASSES
from app.storage import BlobDamaged, Storage

router = APIRouter()
# Of a remote store only a small file is fetched for a look at a page.
_FETCHED_BYTES = 64 * 2**20
# Samples that this process keeps, and files that wait for their turn to be read.
_KEPT_BYTES, _MOST_WAITING = 64 * 2**20, 20
# A stranger's file is shown as the picture that it begins as, and as nothing else, also if it is opened by itself.
_PICTURE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, no-store",
}


class SamplesKept:
    """The samples that this process has read lately; its methods are called on the event loop."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._kept: OrderedDict[str, Samples] = OrderedDict()
        self._coming: dict[str, asyncio.Task[Samples]] = {}
        # Each process that reads a file may take gigabytes.
        self._turn = asyncio.Semaphore(1)

    async def get(self, sha256: str, size_bytes: int, asked: Asked) -> Samples:
        """Return samples of a file, read once for all who ask at the same time.

        Args:
            sha256: of the file.
            size_bytes: of the file.
            asked: which samples.

        Raises:
            Unavailable: too many files wait for their turn.
        """
        key = json.dumps([sha256, asdict(asked)])
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._coming:
            if len(self._coming) >= _MOST_WAITING:
                raise Unavailable(f"Samples of {_MOST_WAITING} files are being read; try again in a few seconds.")
            self._coming[key] = asyncio.create_task(self._read(key, sha256, size_bytes, asked))
            self._coming[key].add_done_callback(lambda task: self._forget(key, task))
        # Who leaves does not stop it for the others.
        return await asyncio.shield(self._coming[key])

    def _forget(self, key: str, task: "asyncio.Task[Samples]") -> None:
        del self._coming[key]
        if not task.cancelled():
            task.exception()  # retrieved here in case nobody waits any more

    async def _read(self, key: str, sha256: str, size_bytes: int, asked: Asked) -> Samples:
        async with self._turn:
            if size_bytes > _FETCHED_BYTES and not await run_in_threadpool(self._storage.is_near, sha256):
                why = f"The file has {size(size_bytes)} and lies in a remote store; more than {size(_FETCHED_BYTES)}"
                return Samples([], 0, f"{why} are not fetched for a look.")
            try:
                async with contextmanager_in_threadpool(self._storage.local_copy(sha256)) as path:
                    found = await read_apart(path, asked)
            except (FileNotFoundError, BlobDamaged):
                return Samples([], 0, "The service does not hold the file any more.")
        if found.samples:  # what failed, as on a machine with much to do, is tried again
            self._kept[key] = found
        while sum(one.size_bytes for one in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return found


@dataclass(frozen=True)
class _Class:
    """Samples of a class.

    Attributes:
        name: of the class; empty if the probe has no labels.
        n_samples: that the class has.
        samples: with the numbers that their addresses have.
    """

    name: str
    n_samples: int
    samples: Sequence[tuple[int, Sample]]


@router.get("/probes/{id}/samples")
async def show_samples(
    request: Request,
    id: schemas.Id,
    visitor: VisitorDep,
    service: ServiceDep,
    first: Annotated[int, Query(ge=0, le=MAX_CLASSES)] = 0,
) -> Response:
    """A few samples of some classes; `first` is the number of classes that stand before them."""
    first -= first % CLASSES
    row = await run_in_threadpool(_probe, service, id)
    found = await _samples_of(request, service, row, first)
    return page(
        request,
        visitor,
        "samples.html",
        row=row,
        classes=_by_class(row, found.samples, first),
        fault=found.fault,
        first=first,
        n_classes=found.n_classes,
        n_a_page=CLASSES,
    )


@router.get("/probes/{id}/samples/{number}")
async def show_picture(
    request: Request,
    id: schemas.Id,
    number: int,
    _: VisitorDep,
    service: ServiceDep,
) -> Response:
    """One picture, with the bytes that the probe's file has; each class has as many numbers as it may show pictures."""
    row = await run_in_threadpool(_probe, service, id)
    first = number // PICTURES
    first -= first % CLASSES
    found = await _samples_of(request, service, row, first)
    numbered = {own: one for group in _by_class(row, found.samples, first) for own, one in group.samples}
    if number not in numbered:
        raise NotFound(f"There is no sample {number} of this probe.")
    if not numbered[number].media_type:
        raise NotFound(f"The sample {numbered[number].fault or 'is no picture'}.")
    return Response(numbered[number].picture, media_type=numbered[number].media_type, headers=_PICTURE_HEADERS)


def shows_samples(row: models.Probe) -> bool:
    """Return whether a probe has a page of samples: of images, of texts, or of tensors that can be pictures."""
    return row.content != "tensors" or is_picture(row.input_shape)


def _probe(service: Service, id_: str) -> models.Probe:
    with read(service.engine) as session:
        row = resources.get(session, models.Probe, id_)
    if not shows_samples(row):
        raise NotFound("Samples are shown of images, of texts, and of tensors of the form of pictures.")
    return row


async def _samples_of(request: Request, service: Service, row: models.Probe, first: int) -> Samples:
    # Checked before a process is started to read the file.
    if first and not 0 <= first < sum(count > 0 for count in row.class_counts):
        raise NotFound("The probe has no such class.")
    asked = Asked(
        format=row.format,
        content=row.content,
        columns=row.columns,
        class_names=row.class_names,
        skipped=first,
        limits=limits_of(service.settings),
    )
    kept: SamplesKept = request.app.state.samples
    return await kept.get(row.sha256, row.size_bytes, asked)


def _by_class(row: models.Probe, found: Sequence[Sample], first: int) -> list[_Class]:
    """Return samples by class; a class's pictures have the numbers that follow on those of the classes before it."""
    by_label: dict[int | None, list[Sample]] = {}
    for one in found:
        by_label.setdefault(one.label, []).append(one)
    groups = []
    present = [label for label, count in enumerate(row.class_counts) if count][first : first + CLASSES]
    for label, own in by_label.items():
        if label is None:
            groups.append(_Class("", row.n_samples, [(one.place, one) for one in own]))
            continue
        start = (first + present.index(label)) * PICTURES
        name = words.class_name(label, row.class_names)
        groups.append(_Class(name, row.class_counts[label], [(start + one.place, one) for one in own]))
    return groups
