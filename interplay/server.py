"""The `interplay` program: the commands of the server, which start without loading the client, and all others.

A server command runs a separate program, which takes every argument that follows, including `--help`.
"""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerCommand:
    """A command of the package interplay-server.

    Attributes:
        module: its module and first arguments.
        summary: a sentence for `interplay --help`.
        extra: the extra of interplay-server that it needs, if any.
        witness: a module that is there where that is installed.
    """

    module: tuple[str, ...]
    summary: str
    extra: str = ""
    witness: str = "uvicorn"

    @property
    def requirement(self) -> str:
        """What pip has to install for it."""
        return f"interplay-server[{self.extra}]" if self.extra else "interplay-server"

    def installed(self) -> bool:
        """Whether it would start; a module `app` or `workers` alone may be anybody's."""
        try:
            importlib.metadata.version("interplay-server")
        except importlib.metadata.PackageNotFoundError:
            return False
        return all(importlib.util.find_spec(name) is not None for name in ("uvicorn", self.witness))


COMMANDS = {
    "serve": ServerCommand(("app", "serve"), "Run the API and its workers.", "worker", "torch"),
    "api": ServerCommand(("app", "api"), "Run the API alone."),
    "worker": ServerCommand(("workers",), "Run a worker, or several.", "worker", "torch"),
    "migrate": ServerCommand(("app", "migrate"), "Bring the database to the current schema."),
    "verify": ServerCommand(("app", "verify"), "Read and hash every stored file; name reports on damaged ones."),
    "retention": ServerCommand(
        ("app", "retention"), "Delete what is older than INTERPLAY_KEEP_... say; --dry-run lists it."
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
    if not command.installed():
        from interplay.command.options import EXIT_USAGE, fail

        detail = f"`interplay {name}` needs more than the client: pip install '{command.requirement}'"
        fail(EXIT_USAGE, "Not installed", detail, {})
    # The current folder must not shadow the service's packages: "app" is a common name. The variable, unlike -P, also
    # holds for the processes that the service starts.
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *command.module, *arguments])  # noqa: S606
