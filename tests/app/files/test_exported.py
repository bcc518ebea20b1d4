"""Archives of torch.export: read without torch, as data, and refused where they are more than that."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from analysis.networks.exported import graph as of_workers
from analysis.networks.exported.operations import AUTOCAST_OFF, REGION_ENDS, allowed
from analysis.networks.loading import load_network
from analysis.saving import exporting
from app.errors import InvalidFile
from app.files.exported import describe_graph, graph_text, graphs, is_exported_program, read_program, write_program
from tests.app.files.programs import make

PROGRAMS = Path(__file__).with_name("programs")
ARCHIVES = sorted(PROGRAMS.glob("*.pt2"))
# Printed by make.py under torch 2.9.1 on aarch64; others differ in the seventh digit.
LOGITS = torch.tensor(
    [1.0603426, 0.4104709, 0.4123954, 1.2217134, -1.6725470, 1.0748822, 0.5547670, 0.2092196, 1.3430268, -1.6279622,
     1.0973128, 0.7829258, -0.1114805, 1.5341147, -1.5570691],
).view(3, 5)  # fmt: skip


def _rewritten(path: Path, to: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """Write an archive again with changed members."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    change(members)
    with zipfile.ZipFile(to, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return to


def _changed_json(ending: str, change: Callable[[Any], object]) -> Callable[[dict[str, bytes]], None]:
    def in_members(members: dict[str, bytes]) -> None:
        name = next(one for one in members if one.endswith(ending))
        whole = json.loads(members[name])
        change(whole)
        members[name] = json.dumps(whole).encode()

    return in_members


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: str(path.stem))
def test_an_archive_of_each_version_becomes_one_graph(path: Path, tmp_path: Path) -> None:
    """Of torch 2.9 to 2.13, of two kinds of processors; its weights give the logits that the script printed."""
    assert is_exported_program(path)
    program = read_program(path)
    assert describe_graph(graph_text(program.graph)) == describe_graph(graph_text(read_program(ARCHIVES[0]).graph))
    target = tmp_path / "weights.safetensors"
    with target.open("wb") as file:
        write_program(path, program, file)
    network = load_network({"family": "exported", "graph": "of the file"}, target, head=None, device="cpu")
    assert network.head_name == "fc"
    assert torch.allclose(network.module(make.inputs()), LOGITS, atol=1e-6)


def test_there_are_archives_of_several_versions() -> None:
    """A folder that lost its files would test nothing."""
    assert [path.stem for path in ARCHIVES] == ["torch-2.10.0", "torch-2.13.0", "torch-2.9.1"]


def test_both_ways_give_one_graph_and_the_same_tensors(tmp_path: Path) -> None:
    """What `save_checkpoint` writes has the hash and the tensors of what torch.export.save wrote."""
    model = make.made()
    exported = exporting.export_model(model, torch.ones(2, 3, 6, 6))
    program = read_program(PROGRAMS / "torch-2.13.0.pt2")
    assert json.loads(json.dumps(exported.graph)) == program.graph
    whole = io.BytesIO()
    write_program(PROGRAMS / "torch-2.13.0.pt2", program, whole)
    found = load(whole.getvalue())
    assert set(found) == set(exported.tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in exported.tensors.items())


def test_the_bounds_are_those_of_workers() -> None:
    """The API refuses what a worker would."""
    assert (graphs.MAX_GRAPH_BYTES, graphs.MAX_NODES) == (of_workers.MAX_GRAPH_BYTES, of_workers.MAX_NODES)


def test_both_writers_leave_out_the_same() -> None:
    """Neither may import the other, so what they leave out and how they name regions stands twice."""
    assert graphs._OF_MACHINE == exporting._OF_MACHINE
    assert graphs._CHECKS == exporting._CHECKS
    assert (graphs._AUTOCAST_OFF, graphs._REGION_ENDS) == (AUTOCAST_OFF, REGION_ENDS)
    for name in sorted(allowed()):
        assert graphs._writes(name) == exporting._writes(name), name


def _entry(members: dict[str, Any]) -> Any:
    return members["config"]["fc.weight"]


def _about(model: Any, name: str) -> Any:
    return model["graph_module"]["graph"]["tensor_values"][name]


def _first_node(model: Any) -> Any:
    return model["graph_module"]["graph"]["nodes"][1]


def _add(content: Any, name: str) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({f"torch-2.13.0/{name}": content})


WEIGHTS, CONSTANTS, MODEL = "model_weights_config.json", "model_constants_config.json", "models/model.json"
REFUSED: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "pickled weights": (_changed_json(WEIGHTS, lambda c: _entry(c).update(use_pickle=True)), "'fc.weight' as a pickle"),
    "an object": (_changed_json(CONSTANTS, lambda c: c["config"].update(x={"path_name": "o"})), "'x', an object of a"),
    "no bytes": (_changed_json(WEIGHTS, lambda c: _entry(c).update(path_name="gone")), "lacks the bytes of 'fc.w"),
    "too few bytes": (
        _changed_json(WEIGHTS, lambda c: _entry(c)["tensor_meta"].update(storage_offset={"as_int": 1})), "ends beyond",
    ),
    "a path out of it": (_changed_json(WEIGHTS, lambda c: _entry(c).update(path_name="../../x")), "lacks the bytes"),
    "few bytes many times": (
        _changed_json(WEIGHTS, lambda c: _entry(c)["tensor_meta"].update(
            sizes=[{"as_int": 2**30}, {"as_int": 4}], strides=[{"as_int": 0}, {"as_int": 1}]
        )),
        "a view of few bytes many times",
    ),
    "sizes that are none": (
        _changed_json(WEIGHTS, lambda c: _entry(c)["tensor_meta"].update(sizes=[{"as_int": -5}, {"as_int": 4}])),
        "sizes that are no numbers",
    ),
    "a sparse tensor": (_changed_json(WEIGHTS, lambda c: _entry(c)["tensor_meta"].update(layout=1)), "no plain form"),
    "another program": (_add(b"{}", "models/other.json"), "holds several programs"),
    "no program": (lambda m: m.pop("torch-2.13.0/models/model.json"), "no program in the form of torch 2.9"),
    "big-endian": (lambda m: m.update({"torch-2.13.0/byteorder": b"big"}), "little-endian"),
    "another version": (_changed_json(MODEL, lambda j: j["schema_version"].update(major=9)), "has version 9"),
    "no JSON": (lambda m: m.update({"torch-2.13.0/models/model.json": b"{"}), "is not JSON"),
    "a bomb": (
        lambda m: m.update({"torch-2.13.0/models/model.json": b"[" + b"[]," * 1_100_000 + b"0]"}), "holds more than",
    ),
    "an unknown value": (
        _changed_json(MODEL, lambda j: _first_node(j)["inputs"][0].update(arg={"as_tensor": {"name": "gone"}})),
        "it uses 'gone' before it is there",
    ),
    "an object as an argument": (
        _changed_json(MODEL, lambda j: _first_node(j)["inputs"][0].update(arg={"as_custom_obj": {"name": "x"}})),
        "argument of the kind 'as_custom_obj'",
    ),
    "an input that is no tensor": (
        _changed_json(MODEL, lambda j: j["graph_module"]["signature"]["input_specs"].append(
            {"custom_obj": {"arg": {"name": "x"}}}
        )),
        "holds what is no tensor, a custom_obj",
    ),
    "a list for the type of an input": (
        _changed_json(MODEL, lambda j: _about(j, "x").update(dtype=[[]])), "type number [[]], which has no plain form",
    ),
    "a list for a type": (
        _changed_json(MODEL, lambda j: _first_node(j)["inputs"][0].update(arg={"as_scalar_type": [1]})),
        "type number [1], which has no plain form",
    ),
    "a list for a memory format": (
        _changed_json(MODEL, lambda j: _first_node(j)["inputs"][0].update(arg={"as_memory_format": [1]})),
        "argument of the kind 'as_memory_format'",
    ),
    "no logits": (_changed_json(MODEL, lambda j: j["graph_module"]["graph"].update(outputs=[])), "must be a tensor of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_data_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """No pickle is opened, nothing lies outside of the archive, and nothing is larger than it seems."""
    change, said = REFUSED[name]
    path = _rewritten(PROGRAMS / "torch-2.13.0.pt2", tmp_path / "changed.pt2", change)
    assert is_exported_program(path)
    with pytest.raises(InvalidFile) as caught:
        read_program(path)
    assert said in caught.value.detail


def test_autocast_that_is_on_is_refused(tmp_path: Path) -> None:
    """Its numbers would be those of another precision than the report's."""

    def switch_on(model: Any) -> None:
        region = next(one for one in model["graph_module"]["graph"]["nodes"] if "autocast" in one["target"])
        region["inputs"][2]["arg"] = {"as_bool": True}

    path = _rewritten(PROGRAMS / "torch-2.13.0.pt2", tmp_path / "on.pt2", _changed_json(MODEL, switch_on))
    with pytest.raises(InvalidFile, match=r"switches torch\.autocast on"):
        read_program(path)


def test_an_archive_of_older_torch_is_refused_with_advice(tmp_path: Path) -> None:
    """Before 2.9 its weights were pickles."""
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", b"\x80\x02")
    assert is_exported_program(path)
    with pytest.raises(InvalidFile, match=r"of torch 2\.9 or later"):
        read_program(path)
