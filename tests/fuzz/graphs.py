"""Damaged graphs of networks: each must be refused or run, in bounded time and memory, and do nothing else.

    python -m tests.fuzz.graphs --count 2000000 --processes 2 --max-seconds 1

A graph goes in by two doors: as the worker reads it from a file, and as the API reads it from an archive of
torch.export. What the worker accepts runs on a batch.
"""

import argparse
import copy
import json
import math
import multiprocessing
import random
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import torch
from jaxtyping import config
from torch import nn

from analysis.errors import AnalysisError
from analysis.networks.exported.graph import parse_graph
from analysis.networks.exported.network import ExportedNetwork, check_runs
from analysis.networks.exported.operations import allowed, operations
from analysis.saving.exporting import from_program
from app.errors import ServiceError
from app.files.exported import graph_text
from app.files.exported.archive import read_program
from app.files.exported.graphs import StoredAs, describe_graph, graph_of

MAX_GROWTH_BYTES = 256 * 2**20
# A batch runs where all its results together are no larger than this.
_RUN_BYTES = 2**24
# What a process of a long campaign has seen is told this often: it may be cut off.
_TELL_SECONDS = 300.0
_NUMBERS = (
    -1, 0, 1, 2, 3, 7, 64, 4096, 65_536, 2**31 - 1, 2**31, 2**40, 2**53, 2**63 - 1, -(2**63), 2**64, -7, 10**30,
    0.5, -0.0, 1e308, 1e-320,
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, "", "a", "mean", "bd,de->be", "\x00", "é" * 300, [], [[]], {}, [None], [1, 2, 3], [0], [-1, -1],
    {"ref": 0}, {"ref": 1}, {"ref": -1}, {"ref": 10**9}, {"ref": True}, {"ref": 1.0}, {"ref": 0, "b": 1},
    {"dtype": "float64"}, {"dtype": "bool"}, {"dtype": "int64"}, {"dtype": "complex64"}, {"dtype": "os.system"},
    {"float": "inf"}, {"float": "nan"}, {"float": "1"}, {"device": None}, {"device": "cuda:0"},
    {"memory_format": "channels_last"}, {"memory_format": "__class__"}, *_NUMBERS,
)  # fmt: skip
_FOREIGN = (
    "os.system", "builtins.exec", "builtins.eval", "_operator.pow", "_operator.getitem", "_operator.lshift",
    "operator.attrgetter", "torch.load", "aten.set_.source_Tensor", "aten.from_file.default", "aten.as_strided.default",
    "aten.bernoulli.default", "aten.rand.default", "aten.randn_like.default", "aten.nonzero.default",
    "aten.resize_.default", "aten._foreach_add_.Scalar", "aten.add.out", "aten.item.default", "prims.add.default",
    "aten.add", "aten.add.Tensor.Tensor", "aten.__class__.default", "higher_order.cond", "torchvision.nms.default",
    "aten.normal_.default", "aten.record_stream.default", "debugprims._load_tensor.default", "aten..default", "aten.",
)  # fmt: skip
_NAMES = ("", ".", "a.", "..", "__class__", "forward", "_modules", "_parameters", "training", "a.b", "a" * 600, "é\x00")


class _Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.relu_(self.norm(self.conv(x))).chunk(2, 1)
        x = nn.functional.max_pool2d(torch.cat([second, first], 1), 2)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.all, self.head = nn.Embedding(9, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.all(self.embed(ids)).unsqueeze(1).split(8, 3)
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=(mask > 0)[:, None, None])
        logits: torch.Tensor = self.head(x.flatten(1, 2)[:, 0])
        return logits


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(3, 4, batch_first=True)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.cells(x)[0].amax(1))
        return logits


class _Indexing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.head = nn.Parameter(torch.ones(4, 4)), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        places = torch.arange(2, device=x.device)
        x = torch.einsum("ntd,de->nte", x.reshape(n * length, width).view(n, length, width), self.mix)
        x = nn.functional.pad(x, (0, 0, 1, 0)).index_select(1, places).masked_fill(x.sum() > 9, -math.inf)
        logits: torch.Tensor = self.head(self.norm(x.clamp(min=-5).sort(1).values[:, -1]))
        return logits


@dataclass(frozen=True)
class Original:
    """The text of a valid graph, and the JSON and tensors of the archive that torch.export made of it."""

    graph: str
    model: str
    tensors: dict[str, StoredAs] = field(repr=False)


def originals() -> dict[str, Original]:
    """Return small valid graphs, by name."""
    dynamic = torch.export.Dim.AUTO
    cases: dict[str, tuple[nn.Module, tuple[Any, ...], Any]] = {
        "convolutional": (_Convolutional(), (torch.randn(2, 3, 6, 6),), ({0: dynamic},)),
        "attention": (
            _Attention(),
            (torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)),
            ({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic}),
        ),
        "recurrent": (_Recurrent(), (torch.randn(2, 3, 3),), ({0: dynamic},)),
        "indexing": (_Indexing(), (torch.randn(2, 3, 4),), ({0: dynamic, 1: dynamic},)),
    }
    made = {}
    with TemporaryDirectory() as folder:
        for name, (model, args, shapes) in cases.items():
            with torch.no_grad(), warnings.catch_warnings():
                # Of torch's own workings.
                warnings.simplefilter("ignore")
                program = torch.export.export(model.eval(), args, dynamic_shapes=shapes)
            path = Path(folder) / f"{name}.pt2"
            torch.export.save(program, path)
            with ZipFile(path) as archive:
                whole = json.loads(archive.read(f"{name}/models/model.json"))
            for node in whole["graph_module"]["graph"]["nodes"]:
                node["metadata"] = {}
            payloads = read_program(path).payloads
            tensors = {key: StoredAs(one.dtype, one.sizes, (key,)) for key, one in payloads.items()}
            made[name] = Original(json.dumps(from_program(program).graph), json.dumps(whole), tensors)
    return made


def damaged(value: str, chance: random.Random) -> Any:
    """Return the graph of a text, with one to four damages."""
    graph = json.loads(value)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        # An earlier damage may have left nothing of the place.
        with suppress(TypeError, IndexError, KeyError, AttributeError, ValueError):
            chance.choice(_DAMAGES)(graph, chance)
    return graph


def _damage_argument(graph: Any, chance: random.Random) -> None:
    node = chance.choice(graph["nodes"])
    if node[1]:
        name = chance.choice(list(node[1]))
        value = node[1][name]
        if isinstance(value, list) and value and chance.random() < 0.7:
            value[chance.randrange(len(value))] = chance.choice(_NUMBERS if chance.random() < 0.6 else _VALUES)
        else:
            node[1][name] = chance.choice(_NUMBERS if chance.random() < 0.5 else _VALUES)


def _damage_ref(graph: Any, chance: random.Random) -> None:
    refs = list(_refs(graph["nodes"]))
    if refs:
        known = len(graph["tensors"]) + len(graph["inputs"]) + len(graph["nodes"])
        chance.choice(refs)["ref"] = chance.randrange(-1, known + 3)


def _damage_operation(graph: Any, chance: random.Random) -> None:
    node = chance.choice(graph["nodes"])
    node[0] = chance.choice(_ALLOWED if chance.random() < 0.8 else _FOREIGN)


def _write_into_weight(graph: Any, chance: random.Random) -> None:
    name = chance.choice(("relu_", "zero_", "mul_", "copy_", "fill_", "clamp_", "index_put_"))
    overloads = [one for one in _ALLOWED if one.startswith(f"aten.{name}.")]
    target = {"ref": chance.randrange(len(graph["tensors"]) + len(graph["inputs"]))}
    graph["nodes"].insert(chance.randrange(len(graph["nodes"])), [chance.choice(overloads), {"self": target}, 1])


def _any_operation(graph: Any, chance: random.Random) -> None:
    """Insert a call of any operation, with an argument of about the right type for each that it has."""
    name = chance.choice(_OPERATIONS)
    schema = operations()[name]._schema
    place = chance.randrange(len(graph["nodes"]) + 1)
    known = len(graph["tensors"]) + len(graph["inputs"]) + sum(node[2] for node in graph["nodes"][:place])
    arguments = {
        one.name: _argument_of(str(one.real_type), known, chance)
        for one in schema.arguments
        if not one.has_default_value() or chance.random() < 0.4
    }
    lists = any("List" in str(one.type) for one in schema.returns)
    n_results = chance.randrange(1, 4) if lists else max(len(schema.returns), 1)
    for ref in [*_refs(graph["nodes"][place:])]:
        ref["ref"] += n_results if ref["ref"] >= known else 0
    graph["logits"][0] += n_results if graph["logits"][0] >= known else 0
    graph["nodes"].insert(place, [name, arguments, n_results])


def _argument_of(kind: str, known: int, chance: random.Random) -> Any:
    """Return an argument for a type of torch, most often one that fits."""
    if chance.random() < 0.03:
        return copy.deepcopy(chance.choice(_VALUES))
    if kind.startswith("Optional["):
        return None if chance.random() < 0.4 else _argument_of(kind.removeprefix("Optional[")[:-1], known, chance)
    if kind.startswith("List["):
        return [
            _argument_of(kind.removeprefix("List[")[:-1], known, chance)
            for _ in range(chance.choice((0, 1, 2, 2, 3, 4)))
        ]
    match kind:
        case "Tensor":
            # Damage before may have made the number of results whatever a float can be.
            return {"ref": chance.randrange(max(int(min(known, 2**31)), 1))}
        case "int" | "SymInt":
            return (
                chance.choice((-2, -1, 0, 1, 1, 2, 3, 4, 5, 8, 64))
                if chance.random() < 0.8
                else chance.choice(_NUMBERS[:-4])
            )
        case "bool":
            return chance.random() < 0.5
        case "str":
            return chance.choice(
                ("none", "tanh", "trunc", "floor", "mean", "sum", "same", "constant", "ab,bc->ac", "ij")
            )
        case "ScalarType":
            return {"dtype": chance.choice(("float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool"))}
        case "Device":
            return {"device": None}
        case "MemoryFormat":
            return {"memory_format": chance.choice(("channels_last", "contiguous_format", "preserve_format"))}
    return chance.choice((0.0, 0.5, 1.0, -1.0, 1e-9, 1e30, 2, -3, *_NUMBERS))


def _damage_tensor(graph: Any, chance: random.Random) -> None:
    tensor = chance.choice(graph["tensors"])
    place = chance.randrange(4)
    if place == 3 and tensor[3] and chance.random() < 0.8:
        tensor[3][chance.randrange(len(tensor[3]))] = chance.choice(_NUMBERS)
    else:
        tensor[place] = chance.choice((*_NAMES, "parameter", "float16", "float64", "int64", "bool", *_VALUES))


def _damage_input(graph: Any, chance: random.Random) -> None:
    given = chance.choice(graph["inputs"])
    if chance.random() < 0.8:
        sizes = (*_NUMBERS, [2, None], [0, 0], [2, 1], [1, 2**40], [4, 4], [None, 2])
        given[2][chance.randrange(len(given[2]))] = chance.choice(sizes)
    else:
        given[chance.randrange(3)] = chance.choice((*_NAMES, "int64", "float16", "bool", *_VALUES))


def _damage_node(graph: Any, chance: random.Random) -> None:
    nodes = graph["nodes"]
    place = chance.randrange(len(nodes))
    match chance.randrange(7):
        case 0:
            del nodes[place]
            nodes or nodes.append(["aten.relu.default", {"self": {"ref": 0}}, 1])
        case 1:
            nodes.insert(place, copy.deepcopy(chance.choice(nodes)))
        case 2:
            other = chance.randrange(len(nodes))
            nodes[place], nodes[other] = nodes[other], nodes[place]
        case 3:
            nodes[place][2] = chance.choice((0, 1, 2, 3, 4096, 4097, *_VALUES))
        case 4:
            names = ("self", "input", "dim", "device", "dtype", "out", "generator", "a b", "", "__class__")
            nodes[place][1][chance.choice(names)] = copy.deepcopy(chance.choice(_VALUES))
        case 5:
            nodes[place][1].pop(chance.choice(list(nodes[place][1]) or [""]), None)
        case _:
            nodes[place] = chance.choice((None, [], ["region.end", {}, 0], ["region.autocast_off", {}, 0], *_VALUES))
            if not (isinstance(nodes[place], list) and len(nodes[place]) == 3):
                nodes[place] = [nodes[place], {}, 1]


def _damage_top(graph: Any, chance: random.Random) -> None:
    match chance.randrange(4):
        case 0:
            graph["logits"][0] = chance.choice(_NUMBERS)
        case 1:
            graph["logits"][1] = chance.choice(([], [1], [None], [[2, None], 3], [[2, None]] * 3, [3] * 9))
        case 2:
            graph[chance.choice(list(graph))] = copy.deepcopy(chance.choice(_VALUES))
            for name in ("tensors", "inputs", "nodes"):
                graph[name] = graph[name] if isinstance(graph.get(name), list) and graph[name] else [["a", "b", [1]]]
            graph["logits"] = graph["logits"] if isinstance(graph.get("logits"), list) and graph["logits"] else [0, []]
            graph["logits"] = [*graph["logits"], []][:2]
        case _:
            graph["nodes"] *= chance.choice((1, 2, 2, 2, 8))


_ALLOWED, _OPERATIONS = tuple(sorted(allowed())), tuple(sorted(operations()))
_DAMAGES: tuple[Callable[[Any, random.Random], None], ...] = (
    _damage_argument, _damage_argument, _damage_argument, _damage_ref, _damage_ref, _damage_operation,
    _damage_operation, _damage_tensor, _damage_input, _damage_node, _damage_node, _damage_top, _write_into_weight,
    *(_any_operation,) * 6,
)  # fmt: skip


def damaged_json(value: str, chance: random.Random) -> Any:
    """Return the JSON of a text, in which one to four places hold something else."""
    whole = json.loads(value)
    for _ in range(chance.choice((1, 1, 2, 4))):
        place, key = whole, chance.choice(list(whole))
        while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.93:
            place = place[key]
            key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
        if isinstance(place, dict) and chance.random() < 0.15:
            place[chance.choice(("as_int", "as_graph", "as_tensors", "name", "extra"))] = place.pop(key)
        else:
            place[key] = copy.deepcopy(chance.choice((*_VALUES, *_NAMES, "torch.ops.aten.relu.default")))
        if not whole:
            return whole
    return whole


def _refs(value: Any) -> Iterator[dict[str, Any]]:
    """Yield what names a result, in the order of the graph; what was damaged before may lie a thousand levels deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "ref" in one:
                yield one
            waiting += reversed(one.values())
        elif isinstance(one, list):
            waiting += reversed(one)


def enter_worker(graph: Any, begin_pass: Callable[[], None] = lambda: None) -> str:
    """Read a graph as a worker does; run it on a batch where that is small. Return what came of it.

    Args:
        graph: the JSON of a graph.
        begin_pass: called before the batch, once the graph has been looked at.

    Raises:
        Exception: anything but a refusal; that is a fault.
    """
    try:
        parsed = parse_graph(graph)
        sizes = [math.prod(one.shape) for one in parsed.tensors]
        with torch.device("meta"):
            network = ExportedNetwork(parsed)
            check_runs(network)
        assert all(node.operation in _ALLOWED for node in parsed.nodes), "an operation is not on the list"
        if sum(sizes) * 8 > _RUN_BYTES:
            return "accepted"
        network = ExportedNetwork(parsed).eval().requires_grad_(False)
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.fill_(1)
        before = [tensor.clone() for tensor in (*network.parameters(), *network.buffers())]
        n = parsed.batch[0]
        shapes = [(n, *(size if isinstance(size, int) else size[0] for size in one.shape[1:])) for one in parsed.inputs]
        if sum(map(math.prod, shapes)) * 8 > _RUN_BYTES or sum(network._examined(shapes)) > _RUN_BYTES:
            return "accepted"
        batch = {
            one.name: torch.ones(shape, dtype=dtype)
            for one, shape, dtype in zip(parsed.inputs, shapes, network._dtypes, strict=True)
        }
        begin_pass()
        try:
            with torch.no_grad():
                network(batch)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, AttributeError):
            # Extraction answers these of a pass: a value may be out of range, which only values tell.
            return "refused at run"
        after = (*network.parameters(), *network.buffers())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "a weight was written into"
    except AnalysisError:
        return "refused"
    return "run"


def enter_api(model: Any, tensors: dict[str, StoredAs]) -> str:
    """Read a program's JSON as the API does. Return what came of it.

    Raises:
        Exception: anything but a refusal; that is a fault.
    """
    from app.files.exported.graphs import Malformed

    try:
        describe_graph(graph_text(graph_of(model, tensors)))
    except (ServiceError, Malformed):
        return "refused by the API"
    return "read by the API"


@dataclass
class Found:
    """What a process of the campaign has seen: counts of outcomes, and faults by kind with their seed.

    Times are of the processor. A pass may take what its operations take, up to the limit of a batch's cost.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    slowest_seconds: float = 0.0
    slowest_pass_seconds: float = 0.0
    growth_bytes: int = 0


def campaign(
    kinds: dict[str, Original],
    seeds: range,
    deadline: float,
    place: Any = None,
    max_seconds: float = math.inf,
) -> Found:
    """Pass a damaged graph for each seed through one of the doors.

    Args:
        kinds: valid graphs, by name.
        seeds: one a graph.
        deadline: of time.monotonic; then it stops.
        place: shared with the parent, which learns from it the seed of a crash.
        max_seconds: of processor time that a graph may take until it is refused or begins its pass.
    """
    found = Found()
    for warm in kinds.values():
        enter_worker(json.loads(warm.graph))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told_at = time.monotonic()
    for seed in seeds:
        if time.monotonic() > deadline:
            break
        if place is not None:
            place.value = seed
        chance = random.Random(seed)
        original = kinds[chance.choice(list(kinds))]
        by_api = chance.random() < 0.25
        value = damaged_json(original.model, chance) if by_api else damaged(original.graph, chance)
        times = [time.process_time()]
        try:
            outcome = enter_api(value, original.tensors) if by_api else enter_worker(value, partial(_note, times))
        except BaseException as error:  # noqa: BLE001  whatever it is, it is a fault
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} {where.filename} {where.lineno}"
            found.faults.setdefault(kind, f"seed {seed}\n{traceback.format_exc()}")
            outcome = "fault"
        times.append(time.process_time())
        seconds, pass_seconds = times[1] - times[0], times[-1] - times[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found.outcomes[outcome] += 1
        found.slowest_seconds = max(found.slowest_seconds, seconds)
        found.slowest_pass_seconds = max(found.slowest_pass_seconds, pass_seconds)
        found.growth_bytes = max(found.growth_bytes, (peak - base) * 1024)
        if seconds > max_seconds:
            found.faults.setdefault(f"slow {seed}", f"it took {seconds:.2f} s")
        if time.monotonic() - told_at > _TELL_SECONDS:
            told_at = time.monotonic()
            print(f"{seed - seeds.start + 1} from {seeds.start}: {found}", file=sys.stderr, flush=True)
        if (peak - base) * 1024 > MAX_GROWTH_BYTES:
            found.faults.setdefault("memory", f"seed {seed} grew by {(peak - base) / 2**10:.0f} MiB")
            base = peak
    return found


def _note(times: list[float]) -> None:
    times.append(time.process_time())


def _forbid_everything_else() -> None:
    """Let the process end if anything starts a program, opens a socket, or opens a file to write."""

    def look(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if event in ("os.system", "os.exec", "os.fork", "subprocess.Popen", "socket.connect") or writes:
            raise SystemExit(f"a graph led to {event} {args}")

    sys.addaudithook(look)


def _process(seeds: range, deadline: float, place: Any, max_seconds: float, answers: Any) -> None:
    torch.set_num_threads(1)
    # A service has none of the checks of shapes, which here take more time than the graphs.
    config.update("jaxtyping_disable", True)
    warnings.simplefilter("ignore")
    kinds = originals()
    # After torch.export, which writes files.
    _forbid_everything_else()
    answers.send(campaign(kinds, seeds, deadline, place, max_seconds))


def main() -> int:
    """Run the campaign in processes; return 1 if a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.graphs", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=4 * 3600.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="1 in a campaign; no limit in tests")
    options = parser.parse_args()
    started = time.monotonic()
    deadline = started + options.seconds
    context = multiprocessing.get_context("spawn")
    each = -(-options.count // options.processes)
    todo = [
        range(options.seed + at, min(options.seed + at + each, options.seed + options.count))
        for at in range(0, options.count, each)
    ]
    total = Found()
    running: list[tuple[Any, Any, Any, range]] = []
    while todo or running:
        while todo and len(running) < options.processes:
            seeds = todo.pop()
            place = context.Value("q", seeds.start)
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_process, args=(seeds, deadline, place, options.max_seconds, sending))
            process.start()
            sending.close()
            running.append((process, place, receiving, seeds))
        process, place, receiving, seeds = running.pop(0)
        try:
            found = receiving.recv()
        except EOFError:
            process.join()
            died = place.value
            total.faults[f"crash at {died}"] = f"the process ended with {process.exitcode} at seed {died}"
            total.outcomes["crash"] += 1
            total.outcomes["before a crash"] += died - seeds.start
            todo.append(range(died + 1, seeds.stop))
            continue
        process.join()
        total.outcomes += found.outcomes
        total.faults |= found.faults
        total.slowest_seconds = max(total.slowest_seconds, found.slowest_seconds)
        total.slowest_pass_seconds = max(total.slowest_pass_seconds, found.slowest_pass_seconds)
        total.growth_bytes = max(total.growth_bytes, found.growth_bytes)
    print(
        f"{total.outcomes.total()} damaged graphs in {time.monotonic() - started:.0f} s: {dict(total.outcomes)}; the "
        f"slowest took {total.slowest_seconds:.2f} s of processor time, a pass {total.slowest_pass_seconds:.2f} s; "
        f"memory grew by {total.growth_bytes / 2**20:.0f} MiB; {len(total.faults)} kinds of faults"
    )
    for kind, fault in total.faults.items():
        print(f"\n{kind}: {fault}")
    return min(len(total.faults), 1)


if __name__ == "__main__":
    sys.exit(main())
