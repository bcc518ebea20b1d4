"""Code shared by several commands: options, opening the client, printing, failing and showing progress."""

import enum
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from interplay.client import DEFAULT_URL, Client
from interplay.command import rendering
from interplay.results import Analysis

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE = 1, 2, 3


class Precision(enum.StrEnum):
    """Precision of a network's forward pass."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def finite(value: Any) -> Any:
    """Check that the numbers of an option without both bounds are finite: JSON cannot carry NaN and infinity."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number")
    return value


Url = Annotated[
    str | None,
    typer.Option("--url", envvar="INTERPLAY_URL", help=f"Where the service listens. Default: {DEFAULT_URL}."),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="INTERPLAY_API_KEY", help="Better in the environment than in a shell's history."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, nothing else.")]
Tokenizer = Annotated[str | None, typer.Option(metavar="FILE|JSON", help="A tokenizer.json, for texts.")]
Prefix = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What stands before the weights' names, where the file holds several copies."),
]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="KEY=VALUE", help="May be repeated; epoch=10 is stored as a number."),
]
Timeout = Annotated[float | None, typer.Option(metavar="SECONDS", min=0, help="Wait no longer; the analysis goes on.")]
Permutations = Annotated[int | None, typer.Option(min=0, help="Permutations of the null baseline.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of all that is drawn.")]
Tolerance = Annotated[
    float | None, typer.Option(min=0, callback=finite, help="Error of MIR that is small enough; 0 is exact.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Inputs at a time.")]
PrecisionOption = Annotated[
    Precision | None, typer.Option(help="Of the forward pass; bfloat16 runs it under autocast. Default: float32.")
]
Samples = Annotated[int | None, typer.Option(min=2, help="So many of the probe's, drawn from each class and split.")]


def evaluation_options(
    permutations: int | None,
    seed: int | None,
    tolerance: float | None,
    batch_size: int | None,
    precision: Precision | None,
    samples: int | None,
) -> dict[str, Any]:
    chosen = {
        "null_permutations": permutations,
        "seed": seed,
        "tolerance": tolerance,
        "batch_size": batch_size,
        "precision": None if precision is None else precision.value,
        "samples": samples,
    }
    return {key: value for key, value in chosen.items() if value is not None}


def stem(path: Path) -> str:
    """Return a file's name without its suffix; for a folder its own name, also for `.`."""
    return path.resolve().name if path.is_dir() else path.stem


def open_client(url: str | None, api_key: str | None) -> Client:
    try:
        return Client(url, api_key)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url / --api-key") from None


def print_body(body: Any, as_json: bool, text: Any = None) -> None:
    if as_json:
        typer.echo(json.dumps(body, indent=2))
    else:
        rendering.console().print(text, soft_wrap=isinstance(text, str))


def fail(code: int, title: str, detail: str, members: Any) -> NoReturn:
    typer.echo(rendering.problem_text(title, detail, members), err=True)
    sys.exit(code)


@contextmanager
def progress_shown() -> Iterator[Callable[[Analysis], None]]:
    """Yield a callback for each state of an analysis: it shows a bar on a terminal, else a line for each change."""
    err = rendering.console(stderr=True)
    if not err.is_terminal:
        seen = [""]

        def print_line(analysis: Analysis) -> None:
            line = rendering.progress_line(analysis)
            if line != seen[0]:
                typer.echo(line, err=True)
            seen[0] = line

        yield print_line
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("queued", total=None)

        def move_bar(analysis: Analysis) -> None:
            progress = analysis["progress"]
            description = rendering.progress_line(analysis)
            bar.update(task, description=description, completed=progress["done"], total=progress["total"] or None)

        yield move_bar


def pair(entry: str, hint: str = "--metadata") -> tuple[str, str]:
    key, separator, value = entry.partition("=")
    if not key or not separator:
        raise typer.BadParameter(f"{entry!r} is not of the form KEY=VALUE", param_hint=hint)
    return key, value


def metadata_of(entries: list[str] | None) -> dict[str, Any]:
    return {key: _parsed(value) for key, value in map(pair, entries or [])}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_not_json)
    except ValueError:
        return text


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def json_value(option: str, text: str | None) -> Any:
    """Return the JSON that an option holds, or that is in the file which it names."""
    if text is None:
        return None
    source = text
    if not text.lstrip().startswith(("{", "[")):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise typer.BadParameter(
                f"{text!r} is neither JSON nor a readable file: {reason}", param_hint=option
            ) from None
    try:
        return json.loads(source, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"not valid JSON: {error}", param_hint=option) from None


def json_object(option: str, text: str | None) -> dict[str, Any] | None:
    value = json_value(option, text)
    if value is not None and not isinstance(value, dict):
        raise typer.BadParameter("must be a JSON object", param_hint=option)
    return value
