"""The `interplay` program: the commands of the server, which start without loading the client, and all others.

A server command runs a separate program, which takes every argument that follows, including `--help`.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerCommand:
    """A command of the server: its module and first arguments, and by extra a module that shows it is installed."""

    module: tuple[str, ...]
    needs: dict[str, str]
    summary: str


COMMANDS = {
    "serve": ServerCommand(("app", "serve"), {"worker": "torch", "server": "uvicorn"}, "Run the API and one worker."),
    "api": ServerCommand(("app", "api"), {"server": "uvicorn"}, "Run the API alone."),
    "worker": ServerCommand(("workers",), {"worker": "torch"}, "Run one worker."),
    "migrate": ServerCommand(("app", "migrate"), {"server": "uvicorn"}, "Bring the database to the current schema."),
    "verify": ServerCommand(
        ("app", "verify"), {"server": "uvicorn"}, "Read and hash every stored file; name reports on damaged ones."
    ),
}


def main() -> None:
    """Run the command that the arguments name; a server command replaces this process."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        start(sys.argv[1], sys.argv[2:])
    # Imported late: the client takes a third of a second to load, and a server does not need it.
    from interplay.command.main import main as run

    run()


def start(name: str, arguments: Sequence[str]) -> None:
    """Replace this process with a command of the server.

    Args:
        name: one of `COMMANDS`.
        arguments: the arguments that follow it on the command line.
    """
    command = COMMANDS[name]
    for extra, witness in command.needs.items():
        if importlib.util.find_spec(witness) is None:
            from interplay.command.options import EXIT_USAGE, fail

            detail = f"`interplay {name}` needs more than the client: pip install 'interplay[{extra}]'"
            fail(EXIT_USAGE, "Not installed", detail, {})
    # The current folder must not shadow the service's packages: "app" is a common name. The variable, unlike -P, also
    # holds for the processes that the service starts.
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *command.module, *arguments])  # noqa: S606
