"""Probes and feature sets: accepted files, refused files, and their batches."""

import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from analysis.errors import AnalysisError
from analysis.probes.feature_set import FeatureSet
from analysis.probes.inputs import INPUT_NAMES, OWN_INPUT, first_samples, n_samples
from analysis.probes.preprocess import Preprocess
from analysis.probes.probe import Probe
from analysis.probes.reading import load_feature_set, load_probe

Format = Literal["safetensors", "npz"]
FORMATS: tuple[Format, ...] = ("safetensors", "npz")


def _images(n: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "inputs": torch.randint(0, 256, (n, 3, 4, 5), dtype=torch.uint8, generator=generator),
        "labels": torch.arange(n) % 4,
        "split": torch.arange(n) % 2,
    }


def _features(n: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features, head = torch.randn(n, 6, generator=generator), torch.randn(4, 6, generator=generator)
    return {
        "features": features,
        "labels": torch.arange(n) % 4,
        "head": head,
        "head_bias": torch.randn(4, generator=generator),
        "logits": features @ head.T,
        "split": torch.arange(n) % 2,
    }


def _saved(tensors: dict[str, Tensor], folder: Path, format: Format = "safetensors") -> Path:
    path = folder / f"probe.{format}"
    if format == "safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        np.savez(path, **arrays)
    return path


def _error(load: Callable[..., Any], *args: Any, **kwargs: Any) -> AnalysisError:
    with pytest.raises(AnalysisError) as caught:
        load(*args, **kwargs)
    assert caught.value.detail
    return caught.value


@pytest.mark.parametrize("format", FORMATS)
def test_a_probe_comes_back_as_stored(format: Format, tmp_path: Path) -> None:
    """Inputs keep their type, labels and split become int64, the number of classes is found."""
    tensors = _images() | {"labels": (torch.arange(12) % 4).to(torch.uint8)}
    probe = load_probe(_saved(tensors, tmp_path, format), format=format)
    assert isinstance(probe.inputs, Tensor)
    assert probe.inputs.dtype == torch.uint8
    assert torch.equal(probe.inputs, tensors["inputs"])
    assert probe.labels.dtype == torch.int64
    assert torch.equal(probe.labels, tensors["labels"].long())
    assert probe.split is not None
    assert torch.equal(probe.split, tensors["split"])
    assert probe.n_classes == 4


@pytest.mark.parametrize("format", FORMATS)
def test_split_is_optional_and_classes_can_be_told(format: Format, tmp_path: Path) -> None:
    """A split may be missing; a given number of classes counts classes without samples."""
    tensors = _images()
    del tensors["split"]
    probe = load_probe(_saved(tensors, tmp_path, format), format=format, n_classes=9)
    assert probe.split is None
    assert probe.n_classes == 9


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.float16, torch.float32, torch.float64],
)
def test_inputs_of_any_number_become_float32(format: Format, dtype: torch.dtype, tmp_path: Path) -> None:
    """Batches are the inputs in order, as float32, the last one shorter."""
    tensors = _images() | {"inputs": (torch.arange(36).reshape(12, 3) % 100).to(dtype)}
    probe = load_probe(_saved(tensors, tmp_path, format), format=format)
    batches = list(probe.batches(5, device="cpu"))
    assert [batch.shape[0] for batch in batches] == [5, 5, 2]
    assert {batch.dtype for batch in batches} == {torch.float32}
    assert torch.equal(torch.cat(batches), tensors["inputs"].to(torch.float32))


def test_bfloat16_and_unsigned_words_are_read(tmp_path: Path) -> None:
    """Types that NumPy or torch support only in part are inputs as well."""
    for dtype in (torch.bfloat16, torch.uint16, torch.uint32):
        tensors = _images() | {"inputs": torch.arange(24).reshape(12, 2).to(dtype)}
        probe = load_probe(_saved(tensors, tmp_path), format="safetensors")
        assert torch.equal(next(probe.batches(100, device="cpu")), torch.arange(24).reshape(12, 2).float())


def test_npz_in_another_byte_order_or_layout_is_read(tmp_path: Path) -> None:
    """Big-endian and Fortran-ordered arrays hold the same numbers."""
    path = tmp_path / "probe.npz"
    inputs = np.arange(24, dtype=">f4").reshape(6, 4)
    np.savez_compressed(path, inputs=np.asfortranarray(inputs), labels=np.array([0, 1, 2] * 2, dtype=">i2"))
    probe = load_probe(path, format="npz")
    assert torch.equal(next(probe.batches(6, device="cpu")), torch.arange(24.0).reshape(6, 4))
    assert probe.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_preprocessing_is_scale_then_mean_and_std(batch_size: int, tmp_path: Path) -> None:
    """Batch by batch the same as x * scale, then (x - mean) / std, with one number for each channel."""
    tensors = _images()
    preprocess = Preprocess(scale=1 / 255, mean=(0.1, 0.2, 0.3), std=[0.5, 1, 2.0])
    probe = load_probe(_saved(tensors, tmp_path), format="safetensors", preprocess=preprocess)
    expected = np.asarray(tensors["inputs"], dtype=np.float64) / 255
    expected = (expected - np.array([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1)) / np.array([0.5, 1, 2]).reshape(1, 3, 1, 1)
    found = torch.cat(list(probe.batches(batch_size, device="cpu")))
    torch.testing.assert_close(found, torch.from_numpy(expected).float())


def test_preprocessing_of_rows_runs_along_features() -> None:
    """For inputs (N, d) there is one number for each feature, or a single number for all."""
    rows = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    per_feature = Preprocess(scale=2, mean=(2.0, 0.0), std=(1.0, 10.0))
    assert torch.equal(per_feature(rows), torch.tensor([[0.0, 2.0], [4.0, 6.0]]))
    assert torch.equal(Preprocess(mean=1, std=2)(rows), (rows - 1) / 2)
    assert torch.equal(Preprocess()(rows), rows)


@pytest.mark.parametrize("wrong", [{"mean": (0.0, 0.0)}, {"std": (1.0,) * 4}, {"mean": (0.0,)}, {"std": ()}])
def test_preprocessing_of_another_number_of_channels_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    """There must be as many numbers as channels; a list of one number does not stand for all."""
    path = _saved(_images(), tmp_path)
    assert _error(load_probe, path, format="safetensors", preprocess=Preprocess(**wrong)).kind == "invalid-probe"


@pytest.mark.parametrize(
    "wrong",
    [
        {"std": 0.0},
        {"std": (1.0, -1.0)},
        {"scale": float("nan")},
        {"mean": float("inf")},
        {"mean": (0.0, float("nan"))},
    ],
)
def test_preprocessing_with_senseless_numbers_is_refused(wrong: dict[str, Any]) -> None:
    """NaN, infinity and deviations that are not above 0 never reach a network."""
    assert _error(Preprocess, **wrong).kind == "invalid-probe"


PROBE_FAULTS: dict[str, dict[str, Tensor | None]] = {
    "no inputs": {"inputs": None},
    "no labels": {"labels": None},
    "fewer labels": {"labels": torch.arange(11) % 4},
    "labels of two dimensions": {"labels": (torch.arange(12) % 4)[:, None]},
    "labels with fractions": {"labels": torch.arange(12) % 4 / 2},
    "a label of NaN": {"labels": torch.tensor([float("nan"), *range(11)])},
    "an infinite label": {"labels": torch.tensor([float("inf"), *range(11)])},
    "a label of too many bits": {"labels": torch.tensor([2.0**63, *range(11)], dtype=torch.float64)},
    "labels of complex numbers": {"labels": (torch.arange(12) % 4).to(torch.complex64)},
    "a negative label": {"labels": torch.arange(12) % 4 - 1},
    "one class": {"labels": torch.full((12,), 2)},
    "fewer splits": {"split": torch.zeros(11).long()},
    "a third split": {"split": torch.arange(12) % 3},
    "a negative split": {"split": -(torch.arange(12) % 2)},
    "split with fractions": {"split": torch.full((12,), 0.5)},
    "no samples": {"inputs": torch.zeros(0, 3), "labels": torch.zeros(0).long(), "split": torch.zeros(0).long()},
    "samples of nothing": {"inputs": torch.zeros(12, 0)},
    "inputs of one dimension": {"inputs": torch.zeros(12)},
    "a number alone": {"inputs": torch.tensor(1.0)},
    "complex inputs": {"inputs": torch.zeros(12, 3, dtype=torch.complex64)},
}


def _with(tensors: dict[str, Tensor], changes: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fault", PROBE_FAULTS)
def test_a_probe_that_does_not_fit_is_refused(fault: str, format: Format, tmp_path: Path) -> None:
    """Missing tensors, wrong lengths, types and ranges have one kind."""
    path = _saved(_with(_images(), PROBE_FAULTS[fault]), tmp_path, format)
    assert _error(load_probe, path, format=format).kind == "invalid-probe"


def test_a_label_beyond_the_classes_is_refused(tmp_path: Path) -> None:
    """Labels must be below a given number of classes; unsigned numbers do not wrap around."""
    path = _saved(_images(), tmp_path)
    assert load_probe(path, format="safetensors", n_classes=4).n_classes == 4
    assert _error(load_probe, path, format="safetensors", n_classes=3).kind == "invalid-probe"
    wrapped = np.array([0, 1, 2**64 - 1, 3] * 3, dtype=np.uint64)
    np.savez(tmp_path / "wrapped.npz", inputs=np.zeros((12, 2)), labels=wrapped)
    assert _error(load_probe, tmp_path / "wrapped.npz", format="npz").kind == "invalid-probe"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_inputs_that_are_not_finite_are_refused(value: float, format: Format, tmp_path: Path) -> None:
    """NaN, infinity and values too large for float32; the error gives the row."""
    inputs = torch.zeros(12, 3, dtype=torch.float64)
    inputs[7, 1] = value
    error = _error(load_probe, _saved(_images() | {"inputs": inputs}, tmp_path, format), format=format)
    assert error.kind == "non-finite-values"
    assert error.members == {"tensor": "inputs", "row": 7}


def test_inputs_that_preprocessing_makes_infinite_are_refused(tmp_path: Path) -> None:
    """Integers are finite, but may not be after preprocessing."""
    path = _saved(_images(), tmp_path)
    error = _error(load_probe, path, format="safetensors", preprocess=Preprocess(scale=3e38))
    assert error.kind == "non-finite-values"


def _npz_with_an_object(path: Path) -> None:
    inputs = np.array([print, print], dtype=object)
    np.savez(path, inputs=inputs, labels=np.array([0, 1]))


def _npz_with_text_for_an_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", "not an array")


def _npz_cut_short(path: Path) -> None:
    np.savez(path, inputs=np.zeros((2, 3)), labels=np.array([0, 1]))
    path.write_bytes(path.read_bytes()[:-30])


def _npz_with_a_flipped_byte(path: Path) -> None:
    np.savez_compressed(path, inputs=np.random.default_rng(0).normal(size=(20, 30)), labels=np.arange(20))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _npz_with_a_huge_array(path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1125899906842624, 64), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros((2, 3)))


def _text(path: Path) -> None:
    path.write_text("inputs, labels\n1, 2\n")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


BROKEN_NPZ = (
    _npz_with_an_object,
    _npz_with_text_for_an_array,
    _npz_cut_short,
    _npz_with_a_flipped_byte,
    _npz_with_a_huge_array,
    _npy,
    _text,
    _empty,
)


@pytest.mark.parametrize("write", BROKEN_NPZ)
def test_a_broken_npz_is_told_apart_from_a_bug(write: Callable[[Path], None], tmp_path: Path) -> None:
    """Pickled objects, cut and damaged archives and other files are refused as probes."""
    path = tmp_path / "probe.npz"
    write(path)
    assert _error(load_probe, path, format="npz").kind == "invalid-probe"


@pytest.mark.parametrize("write", [_npy, _text, _empty])
def test_a_broken_safetensors_is_told_apart_from_a_bug(write: Callable[[Path], None], tmp_path: Path) -> None:
    """Other files are refused, as a probe and as a feature set."""
    path = tmp_path / "file"
    write(path)
    assert _error(load_probe, path, format="safetensors").kind == "invalid-probe"
    assert _error(load_feature_set, path).kind == "invalid-feature-set"


def test_a_missing_file_is_not_bad_data(tmp_path: Path) -> None:
    """A missing file is an error of the caller, not of the data."""
    for format in FORMATS:
        with pytest.raises(FileNotFoundError):
            load_probe(tmp_path / "nothing", format=format)
    with pytest.raises(FileNotFoundError):
        load_feature_set(tmp_path / "nothing")


def test_batches_need_a_size() -> None:
    """A batch of no samples would never end."""
    probe = Probe(torch.zeros(3, 2), torch.tensor([0, 1, 0]), None, 2, None)
    assert _error(probe.batches, 0, device="cpu").kind == "invalid-argument"


def test_inputs_are_never_float32_as_a_whole(tmp_path: Path) -> None:
    """Checking and batching 48 MB of bytes never makes all 192 MB of float32."""
    n = 16_000
    path = tmp_path / "probe.npz"
    np.savez(path, inputs=np.zeros((n, 3, 32, 32), dtype=np.uint8), labels=np.arange(n) % 10)
    code_bytes = _peak_bytes(lambda: load_probe(path, format="npz", preprocess=Preprocess(scale=1 / 255)))
    assert code_bytes < 60 * 2**20, "NumPy's own memory: the bytes and little beside them"
    probe = load_probe(path, format="npz", preprocess=Preprocess(scale=1 / 255))
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in probe.batches(100, device="cpu"):
            pass
    largest = max(event.self_cpu_memory_usage / max(1, event.count) for event in profile.key_averages())
    assert largest <= 100 * 3 * 32 * 32 * 4 * 1.1


def _peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_feature_set_comes_back_wide(dtype: torch.dtype, tmp_path: Path) -> None:
    """Half precision becomes float32, float64 stays, and labels and split are int64."""
    tensors = {n: t.to(dtype) if t.is_floating_point() else t.int() for n, t in _features().items()}
    loaded = load_feature_set(_saved(tensors, tmp_path))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("features", "head", "head_bias", "logits"):
        assert getattr(loaded, name).dtype == wide
        assert torch.equal(getattr(loaded, name), tensors[name].to(wide))
    for name in ("labels", "split"):
        assert getattr(loaded, name).dtype == torch.int64
        assert torch.equal(getattr(loaded, name), tensors[name].long())


def test_a_feature_set_has_one_type(tmp_path: Path) -> None:
    """One float64 tensor widens all, so that features and head multiply."""
    loaded = load_feature_set(_saved(_features() | {"head": _features()["head"].double()}, tmp_path))
    assert loaded.features.dtype == loaded.head.dtype == torch.float64
    assert loaded.head_bias is not None
    assert (loaded.features @ loaded.head.T + loaded.head_bias).shape == (12, 4)


def test_a_feature_set_needs_only_features_labels_and_head(tmp_path: Path) -> None:
    """Other members are None if they are missing in the file."""
    tensors = {name: _features()[name] for name in ("features", "labels", "head")}
    loaded = load_feature_set(_saved(tensors, tmp_path))
    assert loaded.head_bias is None
    assert loaded.logits is None
    assert loaded.split is None


FEATURE_FAULTS: dict[str, dict[str, Tensor | None]] = {
    "no features": {"features": None},
    "no labels": {"labels": None},
    "no head": {"head": None},
    "features of three dimensions": {"features": torch.zeros(12, 6, 1)},
    "features of whole numbers": {"features": torch.zeros(12, 6).long()},
    "no samples": {"features": torch.zeros(0, 6), "labels": torch.zeros(0).long()},
    "features of nothing": {"features": torch.zeros(12, 0), "head": torch.zeros(4, 0)},
    "another width of the head": {"head": torch.zeros(4, 5)},
    "a head of one dimension": {"head": torch.zeros(6)},
    "a head of whole numbers": {"head": torch.zeros(4, 6).long()},
    "a head of too few classes": {"head": torch.zeros(3, 6), "head_bias": None, "logits": None},
    "a bias of another length": {"head_bias": torch.zeros(5)},
    "logits of other classes": {"logits": torch.zeros(12, 5)},
    "logits of other samples": {"logits": torch.zeros(11, 4)},
    "fewer labels": {"labels": torch.arange(11) % 4},
    "labels with fractions": {"labels": torch.zeros(12)},
    "a negative label": {"labels": torch.arange(12) % 4 - 1},
    "one class": {"labels": torch.zeros(12).long()},
    "a third split": {"split": torch.arange(12) % 3},
}


@pytest.mark.parametrize("fault", FEATURE_FAULTS)
def test_a_feature_set_that_does_not_fit_is_refused(fault: str, tmp_path: Path) -> None:
    """Missing tensors, wrong shapes, types and ranges have one kind."""
    path = _saved(_with(_features(), FEATURE_FAULTS[fault]), tmp_path)
    assert _error(load_feature_set, path).kind == "invalid-feature-set"


@pytest.mark.parametrize("name", ["features", "head", "head_bias", "logits"])
def test_features_that_are_not_finite_are_refused(name: str, tmp_path: Path) -> None:
    """Each of the floating-point tensors is checked."""
    tensors = _features()
    tensors[name].view(-1)[-1] = float("inf")
    error = _error(load_feature_set, _saved(tensors, tmp_path))
    assert error.kind == "non-finite-values"
    assert error.members == {"tensor": name, "row": tensors[name].shape[0] - 1}


def test_the_three_are_frozen(tmp_path: Path) -> None:
    """Checked values cannot change afterwards."""
    feature_set = load_feature_set(_saved(_features(), tmp_path))
    for frozen, name in ((feature_set, "head"), (Preprocess(), "scale")):
        with pytest.raises(AttributeError):
            setattr(frozen, name, None)
    assert isinstance(feature_set, FeatureSet)


def _texts(n: int = 12) -> dict[str, Tensor]:
    ids = torch.arange(n * 5).reshape(n, 5)
    return {"input_ids": ids, "attention_mask": (ids % 5 < 4).to(torch.int8), "labels": torch.arange(n) % 4}


@pytest.mark.parametrize("format", FORMATS)
def test_tensors_may_have_the_names_of_a_network(format: Format, tmp_path: Path) -> None:
    """Batches are the tensors by name; integers are int64 and keep their values, also once prepared."""
    tensors = _texts()
    probe = load_probe(_saved(tensors, tmp_path, format), format=format)
    for one in (probe, probe.prepared("cpu")):
        batches = list(one.batches(5, device="cpu"))
        assert [len(batch["input_ids"]) for batch in batches] == [5, 5, 2]
        for name in ("input_ids", "attention_mask"):
            found = torch.cat([batch[name] for batch in batches])
            assert found.dtype == torch.int64
            assert torch.equal(found, tensors[name].long())
    assert probe.prepared("cpu", most_bytes=100) is probe
    assert isinstance(probe.inputs, Tensor | dict)
    assert (n_samples(probe.inputs), n_samples(first_samples(probe.inputs, 3))) == (12, 3)


def test_pixel_values_are_preprocessed_as_inputs_are(tmp_path: Path) -> None:
    """By either name the batches are the same numbers; a mask stays unchanged."""
    images = _images()
    preprocess = Preprocess(scale=1 / 255, mean=(0.1, 0.2, 0.3), std=0.5)
    probe = load_probe(_saved(images, tmp_path), format="safetensors", preprocess=preprocess)
    [expected] = probe.batches(12, device="cpu")
    mask = torch.ones(12, 4, 5, dtype=torch.uint8)
    named = {"pixel_values": images["inputs"], "pixel_attention_mask": mask, "labels": images["labels"]}
    probe = load_probe(_saved(named, tmp_path), format="safetensors", preprocess=preprocess)
    [batch] = probe.batches(12, device="cpu")
    assert torch.equal(batch["pixel_values"], expected)
    assert torch.equal(batch["pixel_attention_mask"], mask.long())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"inputs": torch.zeros(12, 2)}, "one or the other"),
        ({"input_ids": None}, "pixel_values or input_ids"),
        ({"input_ids": torch.zeros(12, 5)}, "input_ids must be integers"),
        ({"attention_mask": torch.ones(12, 4)}, "attention_mask must be [12, 5]"),
        ({"attention_mask": torch.ones(11, 5)}, "attention_mask has 11 samples"),
        ({"token_type_ids": torch.ones(12)}, "token_type_ids must be (N, ...)"),
        ({"labels": None}, "'labels'"),
    ],
)
def test_named_tensors_that_do_not_fit_are_refused(
    changes: dict[str, Tensor | None], word: str, tmp_path: Path
) -> None:
    """Two kinds of inputs, masks alone, ids that are not integers, different shapes."""
    tensors = {name: tensor for name, tensor in {**_texts(), **changes}.items() if tensor is not None}
    error = _error(load_probe, _saved(tensors, tmp_path), format="safetensors")
    assert error.kind == "invalid-probe"
    assert word in error.detail


def test_pixel_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """The error gives their name and row."""
    pixels = torch.zeros(12, 3, 2, 2)
    pixels[7, 1] = float("nan")
    error = _error(
        load_probe, _saved({"pixel_values": pixels, "labels": torch.arange(12) % 4}, tmp_path), format="safetensors"
    )
    assert (error.kind, error.members) == ("non-finite-values", {"tensor": "pixel_values", "row": 7})


def test_app_knows_the_same_names() -> None:
    """The names that the API accepts are those read here."""
    from app.files.probedata import INPUT_NAMES as OF_APP
    from app.files.probedata import OWN_INPUT as OWN_OF_APP

    assert (OF_APP, OWN_OF_APP) == (INPUT_NAMES, OWN_INPUT)
