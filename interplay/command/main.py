"""The `interplay` command: push, analyze, show, export, list, cancel and delete over HTTP, and the server's commands.

Exit codes: 0 success; 1 the analysis or the fetch failed or was cancelled; 2 usage, which includes every problem that
the service responds with; 3 the service, or MLflow, cannot be reached; 6 the wait took longer than --timeout. With
--json stdout holds one JSON value and nothing else; errors and progress go to stderr. `interplay gate` has further exit
codes.
"""

import importlib.metadata
import io
import os
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from cyclopts import App, CycloptsError, CycloptsPanel, Group, MissingArgumentError, Parameter, UnusedCliTokensError
from rich.console import RenderableType

from interplay import server
from interplay.client import AnalysisFailed, FetchFailed, ProblemError, ServiceUnreachable, WaitTimeout
from interplay.command import analyzing, baselines, browsing, pushing
from interplay.command.gate import judge_candidate
from interplay.command.options import EXIT_FAILED, EXIT_TIMEOUT, EXIT_UNREACHABLE, EXIT_USAGE, MAIN, fail
from interplay.command.problems import in_our_words
from interplay.command.values import UsageError


def main() -> None:
    """Run the command; map an expected error to a message and an exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal's encoding lacks is no reason to fail
    try:
        if sys.argv[1:] in _INCOMPLETE:
            app.help_print(sys.argv[1:])
            sys.exit(EXIT_USAGE)
        app()
    except UsageError as error:
        text = f"{error}" if error.option is None else f"Invalid value for {error.option}: {error}"
        app.error_console.print(CycloptsPanel(text))
        sys.exit(EXIT_USAGE)
    except AnalysisFailed as error:
        problem = error.problem or {"title": f"The analysis was {error.analysis['status']}", "detail": ""}
        fail(EXIT_FAILED, problem.get("title", "The analysis failed"), problem.get("detail", ""), problem)
    except FetchFailed as error:
        problem = error.problem or {"title": f"The fetch was {error.fetch['status']}", "detail": ""}
        fail(EXIT_FAILED, problem.get("title", "The fetch failed"), problem.get("detail", ""), problem)
    except ProblemError as error:
        fail(EXIT_USAGE, *in_our_words(error))
    except ServiceUnreachable as error:
        hint = " `interplay serve` starts one here; --url or INTERPLAY_URL names another." if error.refused else ""
        fail(EXIT_UNREACHABLE, f"{error}{hint}", "", {})
    except WaitTimeout as error:
        fail(EXIT_TIMEOUT, str(error), "", {})
    except BrokenPipeError:  # the reader of stdout has gone, such as `head`; what is left to flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except OSError as error:  # a file that vanished or changed its permissions after the arguments were checked
        fail(EXIT_USAGE, "A file cannot be read or written", str(error), {})


def _usage_panel(error: CycloptsError) -> RenderableType:
    """Return the message for arguments that cannot be parsed."""
    if type(error) is MissingArgumentError and error.argument is not None and not error.argument.tokens:
        name = error.argument.name
        given = error.keyword is not None
        noun = "option" if name.startswith("-") else "argument"
        return CycloptsPanel(f"Option {name!r} requires a value." if given else f"Missing {noun} {name!r}.")
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return CycloptsPanel(f"Unexpected argument {error.unused_tokens[0]!r}.")
    return CycloptsPanel(error)


def _version() -> str:
    return f"interplay {importlib.metadata.version('interplay')}"


def _server_command(name: str) -> Callable[..., None]:
    def run(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> None:
        """Run the server command."""
        server.start(name, arguments)

    run.__doc__ = server.COMMANDS[name].summary
    return run


def _new_app(name: str, summary: str, commands: Mapping[str, Mapping[str, Callable[..., Any] | App]]) -> App:
    """Return an app with commands by the panel of the help that shows them and by name, in this order."""
    new = App(
        name,
        summary,
        version=_version,
        help_flags=("--help",),
        version_flags=("--version",) if name == "interplay" else (),
        help_format="plaintext",
        error_formatter=_usage_panel,
        group_parameters=MAIN,
        group_commands=Group("General", sort_key=99),
        default_parameter=Parameter(
            negative=(), show_default=False, allow_repeating=True, json_dict=False, json_list=False
        ),
    )
    for panel, (title, functions) in enumerate(commands.items()):
        group = Group(title, sort_key=panel)
        for rank, (command, function) in enumerate(functions.items()):
            if isinstance(function, App):
                function.group, function.sort_key = group, rank
                new.command(function)
            else:
                new.command(function, name=command, group=group, sort_key=rank)
    return new


app = _new_app(
    "interplay",
    "MIR, HDR and neural collapse of trained networks, from an Interplay service.",
    {
        "Files": {
            "push": _new_app(
                "push",
                "Upload a checkpoint, a probe dataset or a feature set, or have the service fetch it.",
                {
                    "Commands": {
                        "checkpoint": pushing.push_checkpoint,
                        "probe": pushing.push_probe,
                        "features": pushing.push_features,
                    }
                },
            ),
            "convert": pushing.convert,
        },
        "Analyses": {
            "analyze": analyzing.analyze,
            "compare": analyzing.compare,
            "path": analyzing.path,
            "prune": analyzing.prune,
            "series": analyzing.series,
            "wait": analyzing.wait,
            "cancel": browsing.cancel,
        },
        "Results": {
            "show": browsing.show,
            "open": browsing.open_page,
            "list": browsing.list_collection,
            "export": browsing.export_report,
            "download": browsing.download,
            "delete": browsing.delete,
        },
        "Gates": {
            "gate": judge_candidate,
            "baseline": _new_app(
                "baseline",
                "Set, show and list the reports that candidates are compared with.",
                {
                    "Commands": {
                        "set": baselines.set_baseline,
                        "show": baselines.show_baseline,
                        "list": baselines.list_baselines,
                        "history": baselines.show_history,
                    }
                },
            ),
        },
        "Server": {name: _server_command(name) for name in server.COMMANDS},
    },
)
app.register_install_completion_command(
    help="Install completion for this shell: bash, zsh or fish.", group=app.group_commands
)
# Commands that need another command to follow.
_INCOMPLETE = [[], ["push"], ["baseline"]]
# Every argument, including --help, is for the program that takes over.
for _name in server.COMMANDS:
    app[_name].help_flags = ()
    app[_name].version_flags = ()
