"""The `interplay` command: push, analyze, show, export, list, cancel and delete over HTTP, and the server's commands.

Exit codes: 0 success; 1 the analysis failed, was cancelled or timed out; 2 usage, which includes every problem that the
service responds with; 3 the service, or MLflow, cannot be reached. With --json stdout holds one JSON value and nothing
else; errors and progress go to stderr. `interplay gate` has its own exit codes.
"""

import importlib
import importlib.metadata
import io
import sys
from typing import Annotated

import typer

from interplay import server
from interplay.client import AnalysisFailed, ProblemError, ServiceUnreachable, WaitTimeout
from interplay.command import analyzing, browsing, gate, pushing
from interplay.command.options import (
    EXIT_FAILED,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    fail,
)

app = typer.Typer(
    name="interplay",
    help="MIR, HDR and neural collapse of trained networks, from an Interplay service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Run the command; map an expected error to a message and an exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal's encoding lacks is no reason to fail
    try:
        app(prog_name="interplay")
    except AnalysisFailed as error:
        problem = error.problem or {"title": f"The analysis was {error.analysis['status']}", "detail": ""}
        fail(EXIT_FAILED, problem.get("title", "The analysis failed"), problem.get("detail", ""), problem)
    except ProblemError as error:
        fail(EXIT_USAGE, error.title, error.detail, error.members)
    except ServiceUnreachable as error:
        fail(EXIT_UNREACHABLE, str(error), "", {})
    except WaitTimeout as error:
        fail(EXIT_FAILED, str(error), "", {})
    except OSError as error:  # a file that vanished or changed its permissions after the arguments were checked
        fail(EXIT_USAGE, "A file cannot be read or written", str(error), {})


@app.callback()
def interplay(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=lambda v: _version(v)),
    ] = False,
) -> None:
    """MIR, HDR and neural collapse of trained networks, from an Interplay service."""


for _module in (pushing, analyzing, browsing):
    app.add_typer(_module.commands)
gate.register(app)


def _add_server_command(name: str, summary: str) -> None:
    def run(context: typer.Context) -> None:
        server.start(name, context.args)

    # Every argument, including --help, is for the program that takes over.
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, help=summary, context_settings=settings, rich_help_panel="Server")(run)


for _name, _command in server.COMMANDS.items():
    _add_server_command(_name, _command.summary)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"interplay {importlib.metadata.version('interplay')}")
        raise typer.Exit
