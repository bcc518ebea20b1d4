"""The Pythons that the client must run with; `python -m tests.packages.interpreters` lists the missing ones."""

import functools
import os
import subprocess
import sys
from pathlib import Path

SUPPORTED = ("3.11", "3.12", "3.13", "3.14")
# Some Debian Pythons lack the modules that create an environment; they cannot be tested.
_VERSION = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"


@functools.cache
def interpreter(version: str) -> Path | None:
    """Return a Python of that version: this one, one on the path, or one of pyenv (shims run only selected ones)."""
    name = f"python{version}"
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [Path(sys.executable), *(folder / name for folder in folders)]
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/{name}"), reverse=True)
    return next((path for path in candidates if _version_of(path) == version), None)


def missing() -> list[str]:
    """Return the supported versions that this machine lacks."""
    return [version for version in SUPPORTED if interpreter(version) is None]


@functools.cache
def _version_of(path: Path) -> str | None:
    if not os.access(path, os.X_OK):
        return None
    ran = subprocess.run([path, "-I", "-c", _VERSION], capture_output=True, text=True)
    return ran.stdout.strip() if ran.returncode == 0 else None


if __name__ == "__main__":
    for version in SUPPORTED:
        print(
            f"The client's tests, Python {version}:",
            interpreter(version) or "NOT TESTED, as this machine has none with venv",
        )
