"""Which networks a worker can build: every family is imported once, in a process of its own, and lists its names.

That a package is installed does not say that it can be imported: torchvision beside another torch than its own cannot.
Trying takes seconds and much memory, and may end a process. So a worker is there first, and tries then; what it found
it keeps in its data folder for the next start, under a name of all that is installed.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from app.database import write
from app.environment import plain_environment
from app.models import Worker
from app.settings import load_settings

logger = logging.getLogger("interplay")

# In the order in which they are listed; a test compares them with those of `analysis.networks.loading`.
_FAMILIES = ("builtin", "transformers", "timm", "torchvision", "custom")
# Longer than an import takes on a machine that is busy with something else.
_PATIENCE_SECONDS = 600.0


@dataclass
class Offers:
    """What was found so far.

    Attributes:
        families: those that were imported.
        untried: those that are installed and not tried yet.
        unavailable: of those that cannot be imported the library's own words.
        networks: of those whose networks have names, these.
    """

    families: list[str]
    untried: list[str]
    unavailable: dict[str, str] = field(default_factory=dict)
    networks: dict[str, list[str]] = field(default_factory=dict)

    def take(self, family: str, *, error: str | None = None, names: Sequence[str] = ()) -> None:
        """Note how an attempt at a family ended."""
        self.untried.remove(family)
        if error is not None:
            self.unavailable[family] = error
            return
        self.families = sorted([*self.families, family], key=_FAMILIES.index)
        if names:
            self.networks[family] = list(names)


def find_out(offers: Offers, folder: Path, announce: Callable[[Offers], None]) -> None:
    """Try every family that was not tried, and announce each result; what an earlier worker found is taken as it is.

    Args:
        offers: changed as results come.
        folder: where what was found is kept.
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
    """Find out in a thread, and write what was found to the worker's row."""

    def announce(found: Offers) -> None:
        try:
            with write(engine) as session:
                session.execute(sa.update(Worker).where(Worker.id == worker_id).values(**asdict(found)))
        except sa.exc.SQLAlchemyError as error:
            logger.warning("what networks can be built was not stored: %s", error)

    threading.Thread(target=find_out, args=(offers, folder, announce), daemon=True).start()


def _try(offers: Offers, announce: Callable[[Offers], None]) -> str | None:
    """Let a process try what is left, and take its results; the family in the middle of which it ended, if it did."""
    command = [sys.executable, "-m", __name__, *offers.untried]
    # At the end of the block its input ends, and so does the process.
    environment, pipe = plain_environment(load_settings()), subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        deadline = threading.Timer(_PATIENCE_SECONDS, process.kill)
        deadline.daemon = True
        deadline.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                offers.take(**json.loads(line))
                announce(offers)
        except ValueError:
            logger.warning("a line about what networks can be built was cut off")
        finally:
            deadline.cancel()
    return offers.untried[0] if offers.untried else None


def _fingerprint() -> str:
    """Of the interpreter, where it looks for packages, and what is installed there in which version."""
    installed = sorted(f"{one.name} {one.version}" for one in importlib.metadata.distributions())
    paths = [f"{path} {_changed(path)}" for path in sys.path]
    text = json.dumps([sys.executable, sys.version, paths, installed])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _changed(path: str) -> int:
    """When a folder last had a file more or less, as it has after each installation."""
    try:
        return Path(path or ".").stat().st_mtime_ns if "site" in path else 0
    except OSError:
        return 0


def _read(kept: Path, offers: Offers) -> Offers | None:
    """What an earlier worker found of the same families; None where there is nothing that can be read."""
    try:
        content: Mapping[str, Any] = json.loads(kept.read_text())
        found = Offers(**content)
    except (OSError, ValueError, TypeError):
        return None
    same = {*found.families, *found.unavailable} == {*offers.families, *offers.untried} and not found.untried
    return found if same else None


def main(families: Sequence[str]) -> None:
    """Try families, in the process that does; a line of JSON for each."""
    # The worker is gone, however it went: nobody waits for what is being found out.
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
    os.nice(5)
    # What libraries print must not end up between the results.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    from analysis.errors import AnalysisError
    from analysis.networks.loading import names_of

    for family in families:
        found: dict[str, Any] = {"family": family}
        try:
            found["names"] = names_of(family)
        except AnalysisError as error:
            found["error"] = error.members["error"]
        output.write(json.dumps(found) + "\n")
        output.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
