"""Wheels of both packages, built from this repository, and environments to install them into.

For the Python that runs the tests nothing is downloaded: pip finds that the installed packages satisfy the ranges.
"""

import fcntl
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import Distribution
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# pip's configuration on this machine must not affect a test.
ISOLATED = {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}


def build(folder: Path) -> tuple[Path, Path]:
    """Build the wheels of interplay and interplay-server into a folder that processes share; the first one builds."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(folder.glob("*.whl")):
            pip_wheel(folder, ROOT, ROOT / "server")
    client, server = sorted(folder.glob("*.whl"))
    return client, server


def pip_wheel(folder: Path, *sources: Path) -> None:
    """Build wheels of projects or sdists into a folder, with the hatchling that is installed here."""
    options: list[str | Path] = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    done = run([sys.executable, "-m", "pip", "wheel", *options, *sources])
    assert done.returncode == 0, done.stdout + done.stderr


def run(
    command: Sequence[str | Path],
    environment: Mapping[str, str] = MappingProxyType({}),
    *,
    folder: Path = Path("/"),
    isolated: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a program without Python's and our variables and, unless `isolated` is false, without pip's configuration.

    It runs in `folder`, by default outside this repository.
    """
    hidden = ("INTERPLAY_", "PYTHON", *(["PIP_"] if isolated else []))
    given = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    given |= {**(ISOLATED if isolated else {}), **environment}
    return subprocess.run(command, env=given, cwd=folder, capture_output=True, text=True, timeout=280)


def needed(wheel: Path, *, extras: Iterable[str] = ()) -> list[Distribution]:
    """Return the installed distributions that a wheel's requirements lead to, directly or indirectly."""
    (of_wheel,) = importlib.metadata.distributions(path=[str(wheel)])
    found: dict[str, Distribution] = {}
    left = _wanted(of_wheel, extras)
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        distribution = found.get(name) or importlib.metadata.distribution(name)
        if name not in found or requirement.extras:
            found[name] = distribution
            left += _wanted(distribution, requirement.extras)
    return [*found.values()]


def _wanted(distribution: Distribution, extras: Iterable[str]) -> list[Requirement]:
    """Return a distribution's requirements with these extras, on this Python."""
    parsed = [Requirement(text) for text in distribution.requires or ()]
    holds = [{"extra": extra} for extra in ("", *extras)]
    return [one for one in parsed if one.marker is None or any(one.marker.evaluate(place) for place in holds)]


def index(folder: Path, *wheels: Path) -> str:
    """Lay out an index of packages as pip reads one; return its address."""
    folder.mkdir()
    for wheel in wheels:
        page = folder / canonicalize_name(wheel.name.split("-")[0]) / "index.html"
        page.parent.mkdir()
        page.write_text(f'<!DOCTYPE html><html><body><a href="{wheel.as_uri()}">{wheel.name}</a></body></html>')
    return folder.as_uri()


def environment(folder: Path, python: Path = Path(sys.executable), *, has: Iterable[Distribution] = ()) -> Path:
    """Create an environment, with pip if it has other packages; return its Python.

    Args:
        folder: the location of the environment.
        python: the base interpreter.
        has: distributions installed here that can also be imported in it; no others can.
    """
    linked = [*has]
    # Installing pip takes seconds; using the pip of this environment saves them.
    made = run([python, "-m", "venv", "--without-pip", folder])
    assert made.returncode == 0, made.stdout + made.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in [*linked, importlib.metadata.distribution("pip")] if linked else []:
        for top in {PurePosixPath(file).parts[0] for file in distribution.files or ()} - {".."}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    return folder / "bin" / "python"
