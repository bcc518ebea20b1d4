"""Descriptions of networks: refused ones, the cost of building, and families whose package is missing."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from analysis.networks.building import Bounded
from analysis.networks.loading import FAMILIES, available_families, build, load_network
from analysis.passes.extraction import extract_features
from tests.analysis import models
from tests.analysis.models import (
    IMAGE_MODELS,
    N_CLASSES,
    TEXT_MODELS,
    N,
    labelled,
)
from tests.analysis.tiny import error_of
from tests.campaigns import campaign
from tests.services import OPERATORS

CPU = torch.device("cpu")


def _transformers(**config: Any) -> dict[str, Any]:
    bert = {**TEXT_MODELS["Bert"], "model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    return {"family": "transformers", "config": {**bert, **config}}


def _swin(**config: Any) -> dict[str, Any]:
    swin = {**IMAGE_MODELS["Swin"], "model_type": "swin", "architectures": ["SwinForImageClassification"]}
    return {"family": "transformers", "config": {**swin, **config}}


def _by_name(family: str, name: str, **args: Any) -> dict[str, Any]:
    return {"family": family, "name": name, "args": args}


REFUSED: dict[str, dict[str, Any]] = {
    "code of its own": _transformers(auto_map={"AutoModel": "modeling.Model"}),
    "quantised": _transformers(quantization_config={"bits": 4}),
    "one output": _transformers(num_labels=1),
    "regression": _transformers(num_labels=3, problem_type="regression"),
    "no class": _transformers(architectures=None),
    "class of another task": _transformers(architectures=["BertForMaskedLM"]),
    "class of another model": _transformers(architectures=["ViTForImageClassification"]),
    "two classes": _transformers(architectures=["BertForSequenceClassification"] * 2),
    "unknown model": _transformers(model_type="os"),
    "model that fetches by name": {
        "family": "transformers",
        "config": {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]},
    },
    "a million layers": _transformers(num_hidden_layers=10**6),
    "a hundred thousand layers": _transformers(num_hidden_layers=10**5),
    "a list of depths": _swin(depths=[5000, 5000]),
    "a billion classes": _transformers(num_labels=10**9),
    "heads that do not divide": _transformers(num_attention_heads=7),
    "a type of another kind": _transformers(hidden_size="16"),
    "not finite": _transformers(layer_norm_eps=float("inf")),
    "nested": _transformers(task_specific_params=json.loads("[" * 20 + "]" * 20)),
    "sizes that overflow": _transformers(hidden_size=2**40),
    "hub": _by_name("timm", "hf-hub:timm/resnet18"),
    "folder": _by_name("timm", "local-dir:/tmp"),
    "unknown name": _by_name("timm", "resnet9999"),
    "weights of timm": _by_name("timm", "resnet18", pretrained=True),
    "a file": _by_name("timm", "resnet18", checkpoint_path="/etc/passwd"),
    "a configuration": _by_name("timm", "resnet18", pretrained_cfg={"url": "http://localhost"}),
    "one class of timm": _by_name("timm", "resnet18", num_classes=1),
    "features of timm": _by_name("timm", "resnet18", features_only=True),
    "layers of timm": _by_name("timm", "vit_tiny_patch16_224", depth=10**5),
    "unknown argument": _by_name("timm", "resnet18", colour="red"),
    "weights of torchvision": _by_name("torchvision", "resnet18", weights="DEFAULT"),
    "a detector": _by_name("torchvision", "fasterrcnn_resnet50_fpn"),
    "a module's name": _by_name("torchvision", "__init__"),
    "wrong argument": _by_name("torchvision", "vgg11", dropout="much"),
    "config of timm": {"family": "timm", "config": {}},
    "name of transformers": _by_name("transformers", "bert"),
}


@pytest.mark.parametrize(
    # Each of three takes seconds until it is stopped.
    "case",
    campaign(REFUSED, often=REFUSED.keys() - {"a hundred thousand layers", "a list of depths"}),
)
def test_descriptions_are_refused_in_seconds(case: str, tmp_path: Path) -> None:
    """Links to the outside, other networks than classifiers, and depth beyond the file are refused without building."""
    path = tmp_path / "checkpoint"
    save_file({"weight": torch.zeros(2)}, path)
    started = time.perf_counter()
    error = error_of(lambda: load_network(REFUSED[case], path, head=None, device=CPU))
    assert error.kind == "invalid-architecture"
    assert time.perf_counter() - started < 20, (
        "thousands of layers take 2 to 4 s until they are stopped, a million weeks"
    )


@pytest.mark.parametrize(
    "description",
    [
        _transformers(vocab_size=10**12, hidden_size=2**20),
        _transformers(max_position_embeddings=10**11),
        _by_name("timm", "vit_tiny_patch16_224", img_size=10**8),
        _by_name("torchvision", "vit_b_16", image_size=16 * 10**5),
    ],
)
def test_widths_without_end_cost_nothing(description: dict[str, Any], tmp_path: Path) -> None:
    """Networks of 10^12 parameters are compared with the file's header and do not match it."""
    path = tmp_path / "checkpoint"
    save_file({"weight": torch.zeros(2)}, path)
    assert error_of(lambda: load_network(description, path, head=None, device=CPU)).kind == "checkpoint-mismatch"


def test_a_constant_beyond_all_weights_is_not_computed(tmp_path: Path) -> None:
    """Windows of 200 x 200 have a table of 159,201 rows, which a file may hold, and 1.6 thousand million pairs."""
    description = _swin(image_size=1600, window_size=200, num_labels=N_CLASSES)
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in build(description).state_dict().items()}
    save_file(tensors, tmp_path / "checkpoint")
    error = error_of(lambda: load_network(description, tmp_path / "checkpoint", head=None, device=CPU))
    assert error.kind == "invalid-architecture"
    assert "a constant of 3200000000 elements" in error.detail


def test_a_constant_on_a_real_device_is_looked_at_first() -> None:
    """A constructor that requests 8 TB of memory on the processor is stopped before the allocation."""
    with Bounded(1), torch.device("meta"):
        assert torch.zeros(2**40).is_meta
        error = error_of(lambda: torch.zeros(2**40, device="cpu"))
    assert error.kind == "invalid-architecture"


SECOND_BUILD = """
import resource
from analysis.networks.loading import _create
from analysis.networks.building import WithoutInitialisation
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "num_labels": 4}
_create({"family": "transformers", "config": {**config, "hidden_size": 12}}, "cpu")
before = peak()
with WithoutInitialisation():
    network = _create({"family": "transformers", "config": config}, "cpu")
print(sum(parameter.numel() for parameter in network.parameters()), (peak() - before) / 1024)
print(network.bert.embeddings.position_ids.sum().item())
"""


@pytest.mark.slow
def test_parameters_that_a_file_will_replace_take_no_memory() -> None:
    """BERT base, of 438 MB, is built within a few MB, and its table of positions has values."""
    sizes, positions = _printed(SECOND_BUILD, PYTHONPATH=str(OPERATORS))
    n_parameters, grown_mib = (float(word) for word in sizes.split())
    assert n_parameters > 109e6
    assert grown_mib < 60
    assert int(positions) == 511 * 512 // 2


def test_a_network_is_as_initialised_by_its_library() -> None:
    """On a real device it has the library's initial weights, the same for the same seed."""
    description = _by_name("timm", "resnet18", num_classes=N_CLASSES)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(build(description, device=CPU).state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert float(found[0]["layer1.0.bn1.weight"].min()) == 1.0
    assert 0.01 < float(found[0]["conv1.weight"].std()) < 1.0


def test_what_is_left_out_changes_nothing(tmp_path: Path) -> None:
    """Types, implementations and paths of a configuration have no effect: the network computes in float32."""
    saved = models.saved_transformers("Llama", TEXT_MODELS["Llama"], tmp_path)
    more = {
        "_name_or_path": "somebody/else", "dtype": "float16", "torch_dtype": "bfloat16", "use_cache": True,
        "attn_implementation": "somebody/kernel", "_attn_implementation": "somebody/kernel", "return_dict": False,
        "output_hidden_states": True, "gradient_checkpointing": True,
    }  # fmt: skip
    described = {"family": "transformers", "config": {**saved.architecture["config"], **more}}
    network = load_network(described, saved.path, head=None, device=CPU)
    tensors = [*network.module.parameters(), *network.module.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    batch = models.texts(N)
    _, logits, _ = extract_features(network, labelled(batch), device=CPU)
    torch.testing.assert_close(logits, saved.library(batch), rtol=0, atol=1e-5)


IMPORTED = """
import sys
from analysis.networks.loading import available_families, build
families = available_families()
build({"family": "builtin", "name": "mlp", "args": {"sizes": [4, 2]}})
print(families, sorted({"transformers", "timm", "torchvision"} & set(sys.modules)))
"""


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ("timm", "torchvision") else PathFinder.find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from analysis.errors import AnalysisError
from analysis.networks.loading import available_families, build
print(available_families())
try:
    build({"family": "timm", "name": "resnet18", "args": {}})
except AnalysisError as error:
    print(error.kind, error.members, error.detail)
"""


def _printed(program: str, **more: str) -> list[str]:
    """Return the output of a Python process, with additions to its environment."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env={**os.environ, **more}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_libraries_are_imported_when_they_are_needed() -> None:
    """Installed families are listed, and a built-in network is built, without an import of any library."""
    # No package here declares networks of its own; tests/analysis/networks/test_custom.py has one that does.
    installed = [name for name in FAMILIES if name != "custom"]
    assert _printed(IMPORTED) == [f"{installed} []"]
    assert available_families() == installed


def test_a_family_that_is_missing_names_its_extra() -> None:
    """Without the package the family is not listed, and its networks are refused with the extra to install."""
    families, refused = _printed(WITHOUT)
    assert families == "['builtin', 'transformers', 'exported']"
    assert refused.startswith("family-unavailable {'family': 'timm', 'extra': 'timm', ")
    assert "pip install 'interplay-server[timm]'" in refused


def test_a_package_that_does_not_import_says_why() -> None:
    """torchvision with a torch of another version fails with torch's words, not as a bug."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA, as PyPI's torchvision wants")
    program = WITHOUT.replace('in ("timm", "torchvision")', "in ()").replace('"timm"', '"torchvision"')
    _, refused = _printed(program)
    assert refused.startswith("family-unavailable {'family': 'torchvision', 'extra': 'torchvision', ")
    assert "torchvision::nms does not exist" in refused


def test_app_refuses_what_the_builders_refuse() -> None:
    """Bounds and forbidden members that app checks without torch are those of the families."""
    from app.descriptions import architectures
    from app.schemas.base import MAX_CLASSES

    building, timm, torchvision, transformers = (
        importlib.import_module(f"analysis.networks.{name}")
        for name in ("building", "timm", "torchvision", "transformers")
    )
    for bound in ("MAX_NESTING", "MAX_LIST", "MAX_DEPTH", "DEPTH"):
        assert getattr(architectures, bound) == getattr(building, bound)
    assert MAX_CLASSES == building.MAX_CLASSES
    assert architectures.FORBIDDEN_IN_TIMM == timm.FORBIDDEN
    assert architectures.FORBIDDEN_IN_TORCHVISION == torchvision.FORBIDDEN
    assert architectures.FORBIDDEN_IN_CONFIGS == transformers.FORBIDDEN
    assert {*architectures.LEFT_OUT_OF_CONFIGS, "architectures", "model_type"} == transformers._LEFT_OUT
