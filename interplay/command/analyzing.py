"""`interplay analyze`, `compare`, `path`, `prune`, `series` and `wait`: queue analyses and wait for them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

from interplay.client import AnalysisFailed, Client
from interplay.command import rendering
from interplay.command.fetching import follow_fetch
from interplay.command.local import temporary_service
from interplay.command.naming import Named, NamedOption, given_name, id_of, run_of
from interplay.command.options import (
    COMMON,
    DESCRIBED_CHECKPOINT,
    EVALUATION,
    QUEUE,
    Columns,
    Common,
    DescribedCheckpoint,
    Evaluation,
    Queue,
    Timeout,
    note,
)
from interplay.command.progress import upload_shown, wait_for
from interplay.command.values import UsageError, columns_of, existing, finite, pair, stem, values_by_key, whole

ProbeName = Annotated[
    str, Parameter(metavar="NAME|ID", converter=given_name, help="The probe to evaluate on; its name or id.")
]


def analyze(
    file: Annotated[Path | None, Parameter(converter=existing)] = None,
    /,
    *,
    checkpoint: NamedOption = None,
    probe: Annotated[str | None, Parameter(metavar="FILE|NAME|ID", converter=given_name)] = None,
    features: NamedOption = None,
    output: Annotated[Path | None, Parameter(("--output", "-o"), metavar="OUT")] = None,
    column: Columns = None,
    described: DescribedCheckpoint = DESCRIBED_CHECKPOINT,
    evaluation: Evaluation = EVALUATION,
    queue: Queue = QUEUE,
    common: Common = COMMON,
) -> None:
    """Evaluate a checkpoint on a probe, or a feature set.

    A FILE and a probe's file need no service: one runs in a temporary folder until the report is there, and leaves
    nothing but OUT. With --url or INTERPLAY_URL both are pushed to that service. With --json it prints the analysis;
    `interplay show` takes its report_id.

    Args:
        file: A checkpoint's file or folder, which is pushed first; needs --probe.
        checkpoint: A checkpoint of the service; needs --probe.
        probe: The probe; a file or folder is pushed first.
        features: A feature set, instead of a checkpoint and a probe.
        output: Write the report as JSON to this file; waits for it.
        column: Of a probe's file: image, text, label or split, such as image=photo; may be repeated.
    """
    subjects = (file, checkpoint, features)
    if sum(one is not None for one in subjects) != 1 or (features is None) != (probe is not None):
        raise UsageError("Give a FILE and --probe, or --checkpoint and --probe, or --features alone.")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UsageError(f"{str(output)!r} cannot be written: it is a folder, or its folder is missing", "--output")
    columns, parsed = columns_of(column), described.parsed()
    pushes_probe = probe is not None and Path(probe).exists()
    alone = file is not None and common.url is None
    if alone and not pushes_probe:
        raise UsageError(f"{probe!r} is no file; for a probe of a service give its --url too", "--probe")
    with temporary_service() if alone else common.client() as client:
        if file is not None:
            note(f"pushing {rendering.printable(file.name or file)}")
            with upload_shown(file.name) as show:
                pushed, _ = client.push_checkpoint_once(
                    file, name=described.name or stem(file), on_progress=show, **parsed
                )
            checkpoint = pushed["id"]
        elif checkpoint is not None:
            checkpoint = id_of(client, "checkpoints", checkpoint, "--checkpoint")
        if probe is not None and pushes_probe:
            note(f"pushing {rendering.printable(Path(probe).name or probe)}")
            with upload_shown(Path(probe).name) as show:
                probe = client.push_probe(probe, name=stem(Path(probe)), columns=columns, on_progress=show)["id"]
        elif probe is not None:
            probe = id_of(client, "probes", probe, "--probe")
        if features is not None:
            features = id_of(client, "feature-sets", features, "--features")
        analysis = client.create_analysis(
            checkpoint_id=checkpoint,
            probe_id=probe,
            feature_set_id=features,
            options=evaluation.chosen(),
            idempotency_key=queue.idempotency_key,
        )
        if alone or output is not None:
            queue = replace(queue, wait=True)
        follow(client, analysis, queue, common, linked=not alone, output=output)


def compare(
    a: Named,
    b: Named,
    /,
    *,
    probe: ProbeName,
    bootstrap: bool = False,
    resamples: Annotated[int | None, Parameter(converter=whole, validator=validators.Number(gte=10))] = None,
    confidence: Annotated[float | None, Parameter(validator=(validators.Number(gte=0.5, lte=0.9999), finite))] = None,
    evaluation: Evaluation = EVALUATION,
    queue: Queue = QUEUE,
    common: Common = COMMON,
) -> None:
    """Queue a comparison of two checkpoints on the same samples: the difference of every metric, with its interval.

    Args:
        a: Name or id of the reference checkpoint.
        b: Name or id of the checkpoint to compare with it.
        bootstrap: Take standard errors and biases from resamples.
        resamples: Number of resamples of the bootstrap; default: 200.
        confidence: Confidence of the intervals; default: 0.95.
    """
    if resamples is not None and not bootstrap:
        raise UsageError("needs --bootstrap", "--resamples")
    options = evaluation.chosen(interval="bootstrap" if bootstrap else None, resamples=resamples, confidence=confidence)
    with common.client() as client:
        a, b = (id_of(client, "checkpoints", name) for name in (a, b))
        probe = id_of(client, "probes", probe, "--probe")
        analysis = client.create_comparison(
            a, b, probe_id=probe, options=options, idempotency_key=queue.idempotency_key
        )
        follow(client, analysis, queue, common)


def path(
    a: Named,
    b: Named,
    /,
    *,
    probe: ProbeName,
    points: Annotated[int | None, Parameter(converter=whole, validator=validators.Number(gte=2))] = None,
    at: Annotated[list[float] | None, Parameter(metavar="W", validator=finite)] = None,
    adaptive: bool = False,
    recalibrate: bool = False,
    align: bool = False,
    extrapolate: bool = False,
    evaluation: Evaluation = EVALUATION,
    queue: Queue = QUEUE,
    common: Common = COMMON,
) -> None:
    """Queue the straight line between the weights of two checkpoints: loss, error, MIR and HDR on it, and barriers.

    Args:
        a: Name or id of the checkpoint at w = 0.
        b: Name or id of the checkpoint at w = 1.
        points: Number of evenly spaced points; default: 25.
        at: A point; may be repeated.
        adaptive: Refine the points around the peak of the loss.
        recalibrate: Recompute normalisation statistics between the ends.
        align: Permute B's hidden units to match A's first.
        extrapolate: Allow --at below 0 and above 1.
    """
    if sum((points is not None, bool(at), adaptive)) > 1:
        raise UsageError("Give one of --points, --at and --adaptive.")
    grid: Any = {"points": points} if points is not None else {"values": at} if at else "adaptive" if adaptive else None
    options = evaluation.chosen(
        grid=grid,
        normalisation="recalibrate" if recalibrate else None,
        alignment="weight_matching" if align else None,
        extrapolate=extrapolate,
    )
    with common.client() as client:
        a, b = (id_of(client, "checkpoints", name) for name in (a, b))
        probe = id_of(client, "probes", probe, "--probe")
        analysis = client.create_path(a, b, probe_id=probe, options=options, idempotency_key=queue.idempotency_key)
        follow(client, analysis, queue, common)


def prune(
    checkpoint: Named,
    /,
    *,
    probe: ProbeName,
    sparsity: Annotated[
        list[float] | None, Parameter(metavar="S", validator=(finite, validators.Number(gte=0, lte=1)))
    ] = None,
    layerwise: bool = False,
    include_head: bool = False,
    evaluation: Evaluation = EVALUATION,
    queue: Queue = QUEUE,
    common: Common = COMMON,
) -> None:
    """Queue a sweep of magnitude pruning over sparsities.

    Args:
        checkpoint: Name or id of the checkpoint.
        sparsity: Share of the weights to prune; may be repeated.
        layerwise: Prune the same share of each layer.
        include_head: Prune the classification head too.
    """
    options = evaluation.chosen(
        sparsities=sparsity or None, scope="layerwise" if layerwise else None, include_head=include_head
    )
    with common.client() as client:
        analysis = client.create_pruning(
            id_of(client, "checkpoints", checkpoint),
            probe_id=id_of(client, "probes", probe, "--probe"),
            options=options,
            idempotency_key=queue.idempotency_key,
        )
        follow(client, analysis, queue, common)


def series(
    checkpoints: Annotated[list[str] | None, Parameter("X=CHECKPOINT...")] = None,
    /,
    *,
    probe: ProbeName,
    axis: Annotated[str, Parameter(show_default=True)] = "step",
    metadata: Annotated[list[str] | None, Parameter("--metadata", metavar="KEY=VALUE")] = None,
    evaluation: Evaluation = EVALUATION,
    queue: Queue = QUEUE,
    common: Common = COMMON,
) -> None:
    """Queue a series of checkpoints, such as those of a training run, in the order of their numbers.

    Args:
        checkpoints: A number and the name or id of its checkpoint each, such as 0=ID 10=ID.
        axis: Name of the numbers, such as epoch.
        metadata: Take the checkpoints with this metadata, such as run=a, and the number that their metadata have
            under the name of the axis; may be repeated.
    """
    if bool(checkpoints) == bool(metadata):
        raise UsageError("Give either checkpoints, such as 0=ID 10=ID, or --metadata, which finds them.")
    given = _by_number(checkpoints or ())
    wanted = values_by_key(metadata)
    with common.client() as client:
        by_number = (
            _by_metadata(client, wanted, axis)
            if wanted
            else {x: id_of(client, "checkpoints", name) for x, name in given.items()}
        )
        analysis = client.create_series(
            axis,
            by_number,
            probe_id=id_of(client, "probes", probe, "--probe"),
            options=evaluation.chosen(),
            idempotency_key=queue.idempotency_key,
        )
        follow(client, analysis, queue, common)


def wait(analysis: Named, /, *, timeout: Timeout = None, common: Common = COMMON) -> None:
    """Wait until an analysis ends, and show its report; or until a fetch ends, and show what it has made.

    Args:
        analysis: Name or id of the analysis or the fetch; of several with one name the newest.
    """
    with common.client() as client:
        collection, run = run_of(client, analysis)
        if collection == "fetches":
            follow_fetch(client, run, common, timeout=timeout, as_fetch=True)
        else:
            follow(client, run, Queue(wait=True, timeout=timeout), common)


def _by_metadata(client: Client, wanted: Mapping[str, Sequence[str]], axis: str) -> dict[float, str]:
    """Return the ids of checkpoints with some metadata by the number under another key; of equals the newest."""
    found: dict[float, str] = {}
    without: list[str] = []
    for checkpoint in client.list("checkpoints", metadata=wanted):
        x = checkpoint["metadata"].get(axis)
        if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
            without.append(checkpoint["name"])
        elif x in found:
            note(f"Several checkpoints have {axis} {x:g}; the newest of them is taken.")
        else:
            found[x] = checkpoint["id"]
    asked = ", ".join(f"{key}={value}" for key, values in wanted.items() for value in values)
    if without:
        names = ", ".join(map(rendering.printable, without[:5]))
        note(f"Left out, as their metadata have no number {rendering.printable(axis)}: {names}.")
    if len(found) < 2:
        raise UsageError(
            f"{len(found)} checkpoints with {asked} have a number {axis!r} in their metadata; a series needs two",
            "--metadata",
        )
    note(
        f"{len(found)} checkpoints with {rendering.printable(asked)}, {rendering.printable(axis)} "
        f"{min(found):g} to {max(found):g}"
    )
    return dict(sorted(found.items()))


def _by_number(entries: Sequence[str]) -> dict[float, str]:
    found: dict[float, str] = {}
    for number, checkpoint in (pair(entry, "X=CHECKPOINT") for entry in entries):
        try:
            x = float(number)
        except ValueError:
            raise UsageError(f"{number!r} is not a number; expected X=CHECKPOINT.") from None
        if not math.isfinite(x):
            raise UsageError(f"{number!r} is not a finite number; expected X=CHECKPOINT.")
        if x in found:
            raise UsageError(f"The number {number} is given twice.")
        found[x] = checkpoint
    return found


def follow(
    client: Client,
    analysis: Any,
    queue: Queue,
    common: Common,
    *,
    linked: bool = True,
    output: Path | None = None,
) -> None:
    """Print an analysis; with --wait print its end, and without --json its report.

    Args:
        client: of the service.
        analysis: as the service returned it.
        queue: whether to wait, and for how long.
        common: form of the output.
        linked: whether the report's page can be opened later.
        output: file for the report.
    """
    if not queue.wait:
        common.print(analysis, f"analysis {analysis['id']}, {analysis['status']}")
        return
    try:
        ended = wait_for(client, analysis, queue.timeout)
    except AnalysisFailed as error:
        if common.as_json:
            common.print(error.analysis)
        raise
    report = None if common.as_json and output is None else client.get_report(ended["report_id"])
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    page = client.page_of("reports", ended["report_id"]) if linked else None
    common.print(ended, None if common.as_json or report is None else rendering.report_view(report, page))
