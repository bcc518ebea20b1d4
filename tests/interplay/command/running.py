"""Run the command to its end, in a process forked from one that has imported it already.

A new interpreter takes 0.7 seconds to import the command, and the tests run it some 200 times.
"""

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Imported by the process that others are forked from.
from interplay import client  # noqa: F401
from interplay.command import main as command

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])
_PATIENCE_SECONDS = 120


def interplay(*arguments: str | Path, url: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, in an environment without other INTERPLAY_ variables."""
    given = {key: value for key, value in os.environ.items() if not key.startswith("INTERPLAY_")}
    given |= {"COLUMNS": "150", **({} if url is None else {"INTERPLAY_URL": url}), **environment}
    texts = [str(argument) for argument in arguments]
    if any(name.startswith("PYTHON") for name in environment):  # which only a new interpreter reads
        whole = [sys.executable, "-m", "interplay.command", *texts]
        return subprocess.run(
            whole, env=given, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_SECONDS
        )
    with tempfile.TemporaryDirectory(prefix="interplay-command-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = _PROCESSES.Process(target=_run, args=(texts, given, str(Path.cwd()), str(out), str(err)))
        process.start()
        process.join(_PATIENCE_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["interplay", *texts], _PATIENCE_SECONDS)
        code = process.exitcode
        process.close()
        return subprocess.CompletedProcess(["interplay", *texts], code, out.read_text(), err.read_text())


def message(ran: subprocess.CompletedProcess[str]) -> str:
    """Return stderr without the frame and the folds of usage errors."""
    return re.sub(r"[\s│]+", " ", ran.stderr)


def _run(arguments: list[str], environment: dict[str, str], folder: str, out: str, err: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT
    for descriptor, opened in enumerate((os.open(os.devnull, os.O_RDONLY), os.open(out, flags), os.open(err, flags))):
        os.dup2(opened, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["interplay", *arguments]
    command.main()
