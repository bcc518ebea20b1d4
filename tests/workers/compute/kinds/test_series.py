"""Conditions that the points of a series must share, and the networks that they do share."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.errors import AnalysisError
from app import schemas
from app.descriptions.adapters import check_adapter
from app.schemas import Preprocess
from app.schemas.reports import NextTokens, Tokenizer
from app.settings import Settings
from app.storage import Storage
from tests.conftest import MLP
from tests.datafiles import mlp_adapter
from tests.workers.examples import ABOUT, FILES, PROBE, checkpoint, known
from workers.compute.context import Context, Held
from workers.compute.features import FeatureCache
from workers.compute.kinds.series import network_of, require_comparable
from workers.tasks import Base, Checkpoint, Known, SeriesTask


def _point(
    n_classes: int = 10,
    *,
    n_features: int = 5,
    tokenizer: Tokenizer | None = None,
    n_vocabulary: int | None = None,
    preprocess: Preprocess | None = None,
) -> Known:
    tokens = None
    if n_vocabulary is not None:
        tokens = NextTokens(
            ignored_labels=False, n_sequences={}, n_positions={}, n_vocabulary=n_vocabulary, token_ids=[]
        )
    about = {"tokenizer": tokenizer, "next_tokens": tokens, "preprocess": preprocess}
    return known(n_classes, n_features, ABOUT.model_copy(update=about))


def _tokenizer(sha256: str, max_length: int, n_truncated: int, pad_id: int = 0) -> Tokenizer:
    return Tokenizer(sha256=sha256, source="probe", max_length=max_length, pad_id=pad_id, n_truncated=n_truncated)


@pytest.mark.parametrize(
    "points",
    [
        [_point()],
        [_point(), _point()],
        [_point(), _point(n_features=7)],
        [_point(50_257, n_vocabulary=50_257), _point(50_304, n_vocabulary=50_304)],
        [_point(tokenizer=_tokenizer("a", 64, 0, pad_id=1)), _point(tokenizer=_tokenizer("a", 128, 0))],
        [known(10, probe=None), known(10, probe=None)],
    ],
)
def test_points_of_the_same_classes_and_inputs_are_compared(points: list[Known]) -> None:
    """Points may differ in width, in vocabulary around the same tokens, in lengths that truncate nothing, in age."""
    for point in points:
        require_comparable(points[0], point)


@pytest.mark.parametrize(
    ("point", "kind", "word"),
    [
        (_point(12), "architectures-differ", "12 classes where the first checkpoint has 10"),
        (_point(preprocess=Preprocess(resize=8)), "invalid-probe", "preprocessing"),
        (_point(tokenizer=_tokenizer("b", 64, 0)), "invalid-probe", "tokenizer"),
        (_point(tokenizer=_tokenizer("a", 32, 5)), "invalid-probe", "tokenizer"),
    ],
)
def test_points_of_others_are_refused(point: Known, kind: str, word: str) -> None:
    """A series refuses a point of other classes or inputs than the first."""
    first = _point(tokenizer=_tokenizer("a", 64, 0)) if word == "tokenizer" else _point()
    with pytest.raises(AnalysisError, match=word) as caught:
        require_comparable(first, point)
    assert caught.value.kind == kind


def test_a_base_is_loaded_once_for_its_adapters_in_a_row(mlp_checkpoint_file: Path, tmp_path: Path) -> None:
    """Adapters of a base, and the base itself, are put on one network; any other network takes its place in memory."""
    tuned = [mlp_adapter(tmp_path / str(seed), seed=seed) / "adapter_model.safetensors" for seed in range(2)]
    save_file({name: tensor * 2 for name, tensor in load_file(mlp_checkpoint_file).items()}, tmp_path / "other")
    files = dict(zip("abcd", (mlp_checkpoint_file, *tuned, tmp_path / "other"), strict=True))
    paths = {letter * 64: path for letter, path in files.items()}
    row = checkpoint("base").model_copy(update={"architecture": MLP, "sha256": "a" * 64})
    base = Base(id="base", name="base", sha256="a" * 64, asked_prefix=None)
    config = schemas.Adapter.model_validate(
        {**check_adapter(json.loads((tmp_path / "0" / "adapter_config.json").read_text())), "rank": 2}
    )
    adapters = [row.model_copy(update={"sha256": name * 64, "base": base, "adapter": config}) for name in "bc"]
    other = row.model_copy(update={"sha256": "d" * 64})
    order: list[Checkpoint] = [adapters[0], row, adapters[1], adapters[0], other, adapters[1]]
    task = SeriesTask(
        analysis_id="a",
        options=schemas.EvaluationOptions(),
        checkpoints=tuple(order),
        probe=PROBE,
        axis=schemas.Axis(name="place", values=[*range(len(order))]),
    )
    cache, held = FeatureCache(Storage(Settings(data_dir=tmp_path / "data")), 0), Held(0)
    context = Context(
        FILES.model_copy(update={"paths": paths}), torch.device("cpu"), cache, held, {}, lambda phase, done, total: None
    )
    networks = [network_of(task, one, context).module for one in order]
    weights = [network.state_dict()["layers.0.weight"] for network in networks]
    assert [networks[0] is network for network in networks] == [True, True, True, True, False, False]
    assert networks[4] is not networks[5]
    expected = load_file(mlp_checkpoint_file)["layers.0.weight"]
    assert torch.equal(weights[4], 2 * expected)
    # All first four are the one network, which the first adapter was put on last.
    parts = load_file(tuned[0])
    a, b = (parts[f"base_model.model.layers.0.lora_{part}.weight"].double() for part in "AB")
    torch.testing.assert_close(weights[0].double(), expected + 2 * b @ a, rtol=0, atol=1e-6)
