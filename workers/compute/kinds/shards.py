"""Evaluate a checkpoint on a large probe, whose pass is cut into shards that several workers compute.

A shard's features are a part of the entry that the cache keeps of the whole pass. The report puts the parts together,
and computes again what is gone, or damaged.
"""

from dataclasses import dataclass

from analysis.clock import Clock
from analysis.evaluation import EvaluationOptions
from analysis.measures.labels import check_labels
from analysis.networks.loading import LoadedNetwork
from analysis.passes.extraction import PassOptions, planned_batch_size
from analysis.passes.parts import Joining, Span, extract_part, samples_of_parts
from analysis.probes.probe import Probe
from analysis.probes.reading import require_finite_inputs
from workers.compute.context import Context, load, network_facts, options_of
from workers.compute.features import About, Kept, KeptPart, kept_part, name_of
from workers.compute.kinds.evaluation import evaluate_checkpoint, evaluated
from workers.compute.kinds.points import computed_on, where_computed, within_point
from workers.compute.probes import ProbeFacts, read_probe
from workers.tasks import Json, KnownOfShard, ShardAnswer, ShardedReportTask, ShardedTask, ShardTask


@dataclass(frozen=True)
class _Loaded:
    """The network, and the probe, whose inputs are read shard by shard."""

    network: LoadedNetwork
    probe: Probe
    facts: ProbeFacts


@dataclass(frozen=True)
class _Cut:
    """How a pass is cut, as its first shard has decided: samples of each shard but the last, and the batch size."""

    samples: int
    batch_size: int

    def span(self, start: int, n: int) -> Span:
        """Return the shard that begins with a sample."""
        return Span(start, min(start + self.samples, n), n)

    def has_made(self, about: About, start: int) -> bool:
        """Return whether a part is the shard that begins with a sample."""
        span = self.span(start, about.n_samples)
        return (about.start, about.stop, about.batch_size) == (span.start, span.stop, self.batch_size)


def shard(task: ShardTask, context: Context) -> ShardAnswer:
    """Pass one shard and keep its features, unless an earlier analysis has kept them."""
    clock, within, [checkpoint] = Clock(), within_point(context), task.checkpoints
    name, start = name_of(task, checkpoint, context.provenance), int(task.place)
    decided = None if task.first is None else _Cut(task.first.stop, task.first.batch_size or 1)
    with clock.phase("load"):
        about = context.cache.about(name, start)
    reused = about is not None and (decided is None or decided.has_made(about, start))
    if about is None or not reused:
        part = _passed(task, start, decided, within, clock)
        with clock.phase("keep"):
            context.cache.keep_part(name, part)
        about = part.about
    known = KnownOfShard(
        **dict(about.network),
        n_features=about.n_features,
        n_classes=about.n_classes,
        batch_size=about.batch_size,
        computed_on=computed_on(context.provenance),
        entry=name,
        start=start,
        stop=about.stop,
        n_samples=about.n_samples,
        n_rows=about.n_rows,
    )
    return ShardAnswer(known=known, timings_seconds={**clock.seconds}, reused=reused)


def evaluate_shards(task: ShardedReportTask, context: Context) -> Json:
    """Return the body of the report of a checkpoint, from the features of all shards."""
    if not task.points:
        # Planned by a worker of an earlier version, which knows no shards.
        return evaluate_checkpoint(task, context)
    clock, shards = Clock(), [answer.known for answer in task.points]
    joining, about = Joining(sum(one.n_rows for one in shards), shards[0].n_features), None
    first = _Cut(shards[0].stop, shards[0].batch_size or 1)
    for number, one in enumerate(shards):
        with clock.phase("load"):
            part = context.cache.part(one.entry, one.start)
        if part is None or not _is_of(part.about, one):
            part = _passed(task, one.start, first, within_point(context), clock)
            shards[number] = one.model_copy(update={"computed_on": computed_on(context.provenance)})
        with clock.phase("load"):
            joining.take(part.feature_set)
        about = about or part.about
        del part
    # Before the mathematics: it needs neither network nor probe.
    context.held.forget(task.analysis_id)
    assert about is not None
    assert about.probe is not None
    batch_size = min(one.batch_size or about.batch_size for one in shards)
    kept = Kept(joining.feature_set(), about.network, batch_size, about.probe)
    seconds = dict(clock.seconds)
    for answer in task.points:
        for phase, spent in answer.timings_seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    reused = all(answer.reused for answer in task.points)
    return evaluated(task, kept, context, seconds, {**where_computed(shards), "features_reused": reused})


def _is_of(about: About, shard: KnownOfShard) -> bool:
    """Return whether a part is what a shard has told of itself, and not that of another analysis in its place."""
    told = (shard.start, shard.stop, shard.n_samples, shard.n_rows, shard.batch_size)
    return (about.start, about.stop, about.n_samples, about.n_rows, about.batch_size) == told


def _passed(task: ShardedTask, start: int, decided: _Cut | None, context: Context, clock: Clock) -> KeptPart:
    """Pass a shard through the network; the first shard decides how the whole pass is cut."""
    assert task.shard_samples is not None
    with clock.phase("load"):
        loaded = context.held.get(task.analysis_id, _Loaded, lambda: _load(task, context))
    network, probe, n = loaded.network, loaded.probe, len(loaded.probe.labels)
    given = options_of(EvaluationOptions, task)
    with clock.phase("features"):
        if decided is None:
            planned = PassOptions(context.device, given.batch_size, given.precision)
            size = planned_batch_size(network, probe, planned)
            decided = _Cut(samples_of_parts(task.shard_samples, size), size)
        span = decided.span(start, n)
        if not _draws(probe, task):
            require_finite_inputs(probe.part(span.start, span.stop), first_row=start)
        options = PassOptions(context.device, decided.batch_size, given.precision, context.on_progress)
        part, span, batch_size = extract_part(network, probe, span, options)
    return kept_part(part, span, network_facts(network), batch_size, loaded.facts, len(network.weight))


def _draws(probe: Probe, task: ShardedTask) -> bool:
    """Return whether samples were drawn from the probe's file, all of whose inputs have been checked then."""
    return len(probe.labels) < task.probe.n_samples


def _load(task: ShardedTask, context: Context) -> _Loaded:
    context.on_progress("loading", 0, 0)
    [checkpoint] = task.checkpoints
    network = load(context, checkpoint)
    probe, facts = read_probe(task, context.files, network, checkpoint, brought=(checkpoint,), check_inputs=False)
    if not network.predicts_tokens:
        # Of all shards, so that the message does not depend on how they are cut.
        check_labels(probe.labels, len(network.weight), "invalid-probe")
    return _Loaded(network, probe, facts)
