"""Options that several commands share, in groups; printing and failing.

A command has a group as one parameter, and each field of the group's dataclass is an option. The groups are titles in
the command's `--help`.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from cyclopts import Group, Parameter, validators

from interplay.calls.descriptions import CheckpointDescription
from interplay.client import DEFAULT_URL, Client
from interplay.command import rendering
from interplay.command.values import UsageError, finite, json_object, metadata_of, whole

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_TIMEOUT = 1, 2, 3, 6

MAIN = Group("Options", sort_key=1)
FILES = Group("Files", sort_key=2)
_CHECKPOINT = Group("Checkpoint", sort_key=3)
_RESOURCE = Group("Description", sort_key=3)
_EVALUATION = Group("Evaluation", sort_key=4)
_QUEUE = Group("Waiting", sort_key=5)
_SERVICE = Group("Service and output", sort_key=6)

AsJson = Annotated[bool, Parameter("--json", group=_SERVICE, help="Print one JSON value on stdout, nothing else.")]
Timeout = Annotated[
    float | None,
    Parameter(
        group=_QUEUE,
        metavar="SECONDS",
        validator=(validators.Number(gte=0), finite),
        help="Stop waiting after this time, with exit code 6; what was waited for continues.",
    ),
]
NoWait = Annotated[
    bool,
    Parameter(
        "--no-wait",
        group=_QUEUE,
        help="Of an address: print the fetch and let it go on; `interplay wait` and `cancel` take its id.",
    ),
]
Columns = Annotated[list[str] | None, Parameter("--column", metavar="ROLE=NAME")]
FileOrJson = Annotated[str | None, Parameter(metavar="FILE|JSON")]


@Parameter("*", group=_SERVICE)
@dataclass(frozen=True, kw_only=True)
class Service:
    """The service that a command talks to."""

    url: Annotated[
        str | None, Parameter(env_var="INTERPLAY_URL", help=f"URL of the service. Default: {DEFAULT_URL}.")
    ] = None
    api_key: Annotated[
        str | None,
        Parameter(
            env_var="INTERPLAY_API_KEY",
            metavar="KEY",
            help="Better in the environment than in a shell's history.",
        ),
    ] = None

    def client(self) -> Client:
        """Open a client of the service.

        Raises:
            UsageError: the URL or the key is malformed.
        """
        try:
            return Client(self.url, self.api_key)
        except ValueError as error:
            raise UsageError(str(error), "--url / --api-key") from None


@dataclass(frozen=True, kw_only=True)
class Common(Service):
    """The service, and the form of the output."""

    as_json: AsJson = False

    def print(self, body: Any, text: Any = None) -> None:
        """Print a body as JSON or, without --json, a text or another renderable."""
        print_body(body, self.as_json, text)


@Parameter("*", group=_EVALUATION)
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The options of every kind of analysis."""

    permutations: Annotated[
        int | None,
        Parameter(converter=whole, validator=validators.Number(gte=0), help="Permutations of the null baseline."),
    ] = None
    seed: Annotated[
        int | None,
        Parameter(converter=whole, validator=validators.Number(gte=0), help="Seed of every random draw."),
    ] = None
    tolerance: Annotated[
        float | None,
        Parameter(validator=(validators.Number(gte=0), finite), help="Largest accepted error of MIR; 0 is exact."),
    ] = None
    batch_size: Annotated[
        int | None, Parameter(converter=whole, validator=validators.Number(gte=1), help="Inputs per forward pass.")
    ] = None
    precision: Annotated[
        Literal["float32", "bfloat16"] | None,
        Parameter(help="Precision of the forward pass; bfloat16 runs it under autocast. Default: float32."),
    ] = None
    samples: Annotated[
        int | None,
        Parameter(
            converter=whole,
            validator=validators.Number(gte=2),
            help="Number of samples, drawn from each class and split of the probe. Default: all.",
        ),
    ] = None

    def chosen(self, **further: Any) -> dict[str, Any]:
        """Return the given options as the service names them, with further ones; None and False are left out."""
        options = {
            "null_permutations": self.permutations,
            "seed": self.seed,
            "tolerance": self.tolerance,
            "batch_size": self.batch_size,
            "precision": self.precision,
            "samples": self.samples,
        }
        given = {key: value for key, value in options.items() if value is not None}
        return given | {key: value for key, value in further.items() if value is not None and value is not False}


@Parameter("*", group=_QUEUE)
@dataclass(frozen=True, kw_only=True)
class Queue:
    """What happens with an analysis once it is queued."""

    wait: Annotated[bool, Parameter(help="Wait until the analysis ends and show its report.")] = False
    timeout: Timeout = None
    idempotency_key: Annotated[
        str | None, Parameter(metavar="KEY", help="The same key and request give the same analysis.")
    ] = None


@Parameter("*", group=_RESOURCE)
@dataclass(frozen=True, kw_only=True)
class Described:
    """The description that every pushed resource has."""

    name: Annotated[
        str | None, Parameter(help="Display name. Default: the file's without its suffix, or the repository's.")
    ] = None
    metadata: Annotated[
        list[str] | None,
        Parameter("--metadata", metavar="KEY=VALUE", help="May be repeated; epoch=10 is stored as a number."),
    ] = None


@Parameter("*", group=_CHECKPOINT)
@dataclass(frozen=True, kw_only=True)
class DescribedCheckpoint(Described):
    """The description of a pushed checkpoint."""

    architecture: Annotated[
        FileOrJson, Parameter(help="Description of the network. Default: the one in the file, or config.json.")
    ] = None
    head: Annotated[
        str | None, Parameter(metavar="MODULE", help="Name of the head's module. Default: the family's own.")
    ] = None
    prefix: Annotated[
        str | None,
        Parameter(metavar="NAME", help="Prefix of the weights' names, if the file holds several copies."),
    ] = None
    preprocess: Annotated[
        FileOrJson,
        Parameter(help="Preprocessing of images, for probes without one; a preprocessor_config.json is accepted too."),
    ] = None
    tokenizer: Annotated[FileOrJson, Parameter(help="A tokenizer.json, for texts of probes without one.")] = None

    def parsed(self) -> CheckpointDescription:
        """Return the description as the client takes it, without the name."""
        return {
            "architecture": json_object("--architecture", self.architecture),
            "head": self.head,
            "prefix": self.prefix,
            "preprocess": json_object("--preprocess", self.preprocess),
            "tokenizer": json_object("--tokenizer", self.tokenizer),
            "metadata": metadata_of(self.metadata),
        }


# Defaults of the commands' parameters; frozen, so that one of each is enough.
SERVICE, COMMON, EVALUATION, QUEUE = Service(), Common(), Evaluation(), Queue()
DESCRIBED, DESCRIBED_CHECKPOINT = Described(), DescribedCheckpoint()


def print_body(body: Any, as_json: bool, text: Any = None) -> None:
    """Print a body as JSON, or a text or another renderable in its place."""
    if as_json:
        write(json.dumps(body, indent=2) + "\n")
    else:
        rendering.console().print(text, soft_wrap=isinstance(text, str))


def write(text: str) -> None:
    """Write a text to stdout at once, so that a closed pipe is noticed here and not at the exit of the process."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a line on stderr, where progress and errors go."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def fail(code: int, title: str, detail: str, members: Mapping[str, Any]) -> NoReturn:
    """Print a problem on stderr and exit with a code."""
    note(rendering.problem_text(title, detail, members))
    sys.exit(code)
