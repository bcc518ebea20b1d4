"""Find which networks a worker can build: import every family once, in a separate process, and list its names.

An installed package may fail to import, as torchvision does beside a torch that it was not built for. Trying takes
seconds and much memory, and may end the process. So a worker registers first and tries then. It caches the result in
its data folder for the next start, under a fingerprint of all that is installed.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import sqlalchemy as sa
from pydantic import TypeAdapter

from app.database import write
from app.environment import plain_environment
from app.models import Worker
from app.settings import load_settings
from workers.tasks import Frozen

logger = logging.getLogger("interplay")

# In listing order; a test compares them with those of `analysis.networks.loading`.
_FAMILIES = ("builtin", "transformers", "timm", "torchvision", "custom", "exported")
# Longer than an import takes on a busy machine.
_PATIENCE_SECONDS = 600.0


@dataclass
class Offers:
    """The families found so far.

    Attributes:
        families: families that were imported.
        untried: families that are installed and not tried yet.
        unavailable: the library's error message, by family that cannot be imported.
        networks: names of networks, by family whose networks have names.
    """

    families: list[str]
    untried: list[str]
    unavailable: dict[str, str] = field(default_factory=dict)
    networks: dict[str, list[str]] = field(default_factory=dict)

    def take(self, family: str, *, error: str | None = None, names: Sequence[str] = ()) -> None:
        """Record the result of trying a family."""
        self.untried.remove(family)
        if error is not None:
            self.unavailable[family] = error
            return
        self.families = sorted([*self.families, family], key=_FAMILIES.index)
        if names:
            self.networks[family] = list(names)


class _Tried(Frozen):
    """The result of importing a family: the names of its networks, or the library's error message."""

    family: str
    error: str | None = None
    names: tuple[str, ...] = ()


def find_out(offers: Offers, folder: Path, announce: Callable[[Offers], None]) -> None:
    """Try every untried family and announce each result; use the cached result of an earlier worker as it is.

    Args:
        offers: changed as results come.
        folder: where the result is cached.
        announce: called after each result.
    """
    kept = folder / f"networks-{_fingerprint()}.json"
    if (found := _read(kept, offers)) is not None:
        announce(found)
        return
    while offers.untried:
        trying = _try(offers, announce)
        if trying is not None:
            offers.take(trying, error="importing it ended the process")
            announce(offers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(asdict(offers)))
        part.replace(kept)
    except OSError as error:
        logger.warning("what networks can be built was not kept for the next start: %s", error)


def start(offers: Offers, folder: Path, engine: sa.Engine, worker_id: str) -> None:
    """Try the families in a thread, and write the results to the worker's row."""

    def announce(found: Offers) -> None:
        try:
            with write(engine) as session:
                session.execute(sa.update(Worker).where(Worker.id == worker_id).values(**asdict(found)))
        except sa.exc.SQLAlchemyError as error:
            logger.warning("what networks can be built was not stored: %s", error)

    threading.Thread(target=find_out, args=(offers, folder, announce), daemon=True).start()


def _try(offers: Offers, announce: Callable[[Offers], None]) -> str | None:
    """Try the untried families in a process and record its results; return the family at which it died, if any."""
    command = [sys.executable, "-m", __name__, *offers.untried]
    # At the end of the block its input closes, and the process ends.
    environment, pipe = plain_environment(load_settings()), subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        deadline = threading.Timer(_PATIENCE_SECONDS, process.kill)
        deadline.daemon = True
        deadline.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tried = _Tried.model_validate_json(line)
                offers.take(tried.family, error=tried.error, names=tried.names)
                announce(offers)
        except ValueError:
            logger.warning("a line about what networks can be built was cut off")
        finally:
            deadline.cancel()
    return offers.untried[0] if offers.untried else None


def _fingerprint() -> str:
    """Return a hash of the interpreter, its search path for packages, and the installed packages with versions."""
    installed = sorted(f"{one.name} {one.version}" for one in importlib.metadata.distributions())
    paths = [f"{path} {_changed(path)}" for path in sys.path]
    text = json.dumps([sys.executable, sys.version, paths, installed])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _changed(path: str) -> int:
    """Return the time in ns of the last change of a folder of packages, which every installation makes; else 0."""
    try:
        return Path(path or ".").stat().st_mtime_ns if "site" in path else 0
    except OSError:
        return 0


def _read(kept: Path, offers: Offers) -> Offers | None:
    """Return the cached result of an earlier worker for the same families; None if it is missing or unreadable."""
    try:
        found = TypeAdapter(Offers).validate_json(kept.read_bytes())
    except (OSError, ValueError):
        return None
    same = {*found.families, *found.unavailable} == {*offers.families, *offers.untried} and not found.untried
    return found if same else None


def main(families: Sequence[str]) -> None:
    """Try families, in the separate process, and print a line of JSON for each."""
    # When input ends the worker has ended, for whatever reason: nothing waits for the results.
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
    os.nice(5)
    # Output printed by libraries must not mix with the results.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    from analysis.errors import AnalysisError
    from analysis.networks.loading import names_of

    for family in families:
        try:
            tried = _Tried(family=family, names=tuple(names_of(family)))
        except AnalysisError as error:
            tried = _Tried(family=family, error=error.members["error"])
        output.write(tried.model_dump_json() + "\n")
        output.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
