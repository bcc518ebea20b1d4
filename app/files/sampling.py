"""What is asked for samples of a probe, the process that reads them, and its answer; app/files/samples.py runs there.

Strangers' files may be large, slow or broken, and some end the process that reads them: the process that reads one has
limits of time and memory, and is ended with its caller.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from app.environment import plain_environment
from app.errors import Unavailable
from app.settings import Settings

#: Classes of one page, and places of each class's pictures in the numbers of all of a probe's pictures.
CLASSES, PICTURES = 20, 5
#: After this the process is ended, and shows nothing.
MOST_SECONDS = 20.0
_READER = "app.files.samples"
# Heights and widths of tensors that are shown as pictures.
_SIDES = range(4, 257)
_LIMITS = {
    "max_rows", "max_members", "max_unpacked_bytes", "max_unpacked_ratio", "max_text_bytes", "max_npz_bytes",
    "max_npz_ratio", "max_image_pixels",
}  # fmt: skip
_SAID_CHARACTERS = 4000
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """Which samples of which probe.

    Attributes:
        format: of the file, as the probe's row says, like the following ones.
        content: of the file.
        columns: names by role.
        class_names: in the order of the labels.
        skipped: classes that earlier pages have.
        limits: the operator's, by the names of their settings.
    """

    format: Any
    content: str
    columns: dict[str, str | None] | None
    class_names: list[str] | None
    skipped: int
    limits: dict[str, Any]


def limits_of(settings: Settings) -> dict[str, Any]:
    """Return the operator's limits that the reading of a file keeps."""
    return settings.model_dump(include=_LIMITS)


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        label: its class; None if the probe has no labels.
        place: its place among those of its class.
        text: of a probe of texts, the beginning.
        media_type: of a picture.
        fault: why there is neither, as words that follow on the sample's name; empty if there is one.
        picture: bytes of a picture.
    """

    label: int | None
    place: int
    text: str = ""
    media_type: str = ""
    fault: str = ""
    picture: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Samples:
    """Samples of some classes.

    Attributes:
        samples: sorted by class and place.
        n_classes: classes that have samples, on all pages.
        fault: why there are no samples, or not all, as a sentence; empty if these are all.
    """

    samples: list[Sample]
    n_classes: int
    fault: str = ""

    @property
    def size_bytes(self) -> int:
        """What these take of memory, roughly."""
        return sum(len(one.picture) + 4 * len(one.text) + 500 for one in self.samples) + 1000


def is_picture(shape: Sequence[int] | None) -> bool:
    """Return whether a tensor's sample is shown as a picture: (H, W), (1, H, W) or (3, H, W)."""
    sides = list(shape or ())
    if len(sides) == 3 and sides[0] in (1, 3):
        sides = sides[1:]
    return len(sides) == 2 and all(side in _SIDES for side in sides)


async def read_apart(path: Path, asked: Asked) -> Samples:
    """Return samples of a file, read by another process.

    Raises:
        Unavailable: this machine cannot start one more process.
    """
    task = json.dumps({"path": str(path), "asked": asdict(asked)}).encode()
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", _READER, stdin=pipe, stdout=pipe, stderr=pipe, env=plain_environment()
        )
    except OSError as error:
        raise Unavailable(f"The file cannot be looked into now: {error.strerror}.") from None
    try:
        answer, said = await asyncio.wait_for(process.communicate(task), MOST_SECONDS)
    except TimeoutError:
        return Samples([], 0, f"Looking into the file took more than {MOST_SECONDS:.0f} seconds.")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return _unpacked(answer)
    text = said.decode(errors="replace").strip()[-_SAID_CHARACTERS:]
    logger.warning("the process that read samples ended with %d: %s", process.returncode, text)
    return Samples([], 0, "The process that looked into the file was ended by what it holds.")


def packed(found: Samples) -> bytes:
    """Return samples as a line of JSON and the pictures' bytes."""
    listed = [{**asdict(one), "picture": len(one.picture)} for one in found.samples]
    head = json.dumps({"samples": listed, "n_classes": found.n_classes, "fault": found.fault})
    return b"".join((head.encode(), b"\n", *(one.picture for one in found.samples)))


def _unpacked(content: bytes) -> Samples:
    head, _, rest = content.partition(b"\n")
    found, at, samples = json.loads(head), 0, []
    for entry in found["samples"]:
        end = at + entry["picture"]
        samples.append(Sample(**{**entry, "picture": rest[at:end]}))
        at = end
    return Samples(samples, found["n_classes"], found["fault"])
