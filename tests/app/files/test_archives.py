"""Hugging Face folders in archives: weights merged from shards, and archives that are refused."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from app.errors import InvalidFile
from app.files import tensorfile
from app.files.archives import is_archive, open_folder, write_weights
from tests.app.api.test_uploads import problem
from tests.datafiles import nameless
from tests.services import Service

LIMIT = 2**24
Files = Mapping[str, bytes]
Packer = Callable[[Files, Path], Path]


def tarred(files: Files, path: Path, mode: str = "w") -> Path:
    """Return the files as a tar."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def gzipped(files: Files, path: Path) -> Path:
    """Return the files as a compressed tar."""
    return tarred(files, path, "w:gz")


def zipped(files: Files, path: Path) -> Path:
    """Return the files as a compressed zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def sharded() -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """Return a folder of two shards of several types, its index and descriptions, and all tensors."""
    generator = torch.Generator().manual_seed(0)
    first = {"a.weight": torch.randn(7, 5, generator=generator), "a.bias": torch.randn(7, generator=generator).half()}
    second = {
        "b.weight": torch.randn(3, 7, generator=generator).bfloat16(),
        "b.steps": torch.tensor([3, 4]),
        "b.scale": torch.tensor(2.0),
    }
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])
    files = {
        "net/README.md": b"hello",
        "net/config.json": json.dumps({"model_type": "vit"}).encode(),
        "net/preprocessor_config.json": b'{"do_resize": true}',
        "net/model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        f"net/{names[0]}": save(first),
        f"net/{names[1]}": save(second),
        "net/checkpoints/old/config.json": b'{"model_type": "other"}',
    }
    return files, {**first, **second}


def merged(path: Path, target: Path) -> Path:
    """Return the weights of an archive, written anew."""
    assert is_archive(path)
    with open_folder(path, max_bytes=LIMIT) as folder, target.open("wb") as file:
        write_weights(folder, file)
    return target


@pytest.mark.parametrize("pack", [tarred, gzipped, zipped])
def test_shards_become_one_file(tmp_path: Path, pack: Packer) -> None:
    """Merged shards keep every tensor bit for bit, whatever the archive; the same weights give the same file."""
    files, tensors = sharded()
    out = merged(pack(files, tmp_path / "net"), tmp_path / "out.safetensors")
    assert tensorfile.inspect_safetensors(out).tensors.keys() == tensors.keys()
    written = load_file(out)
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    again = merged(tarred(dict(reversed(files.items())), tmp_path / "other"), tmp_path / "again.safetensors")
    assert again.read_bytes() == out.read_bytes()


def test_descriptions_are_those_of_the_outermost_folder(tmp_path: Path) -> None:
    """The descriptions of the outermost folder are used, not those of another network in a subfolder."""
    with open_folder(tarred(sharded()[0], tmp_path / "x.tar"), max_bytes=LIMIT) as folder:
        assert folder.config == {"model_type": "vit"}
        assert folder.preprocessor == {"do_resize": True}
        assert folder.tokenizer is None


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    """`model.safetensors` is used unchanged, also beside an optimizer's file and an index of shards."""
    weights = save({"w": torch.ones(3)}, metadata={"architecture": "{}"})
    files = {"net/config.json": b"{}", "net/model.safetensors": weights, "net/optimizer.safetensors": b"x"}
    for name, more in (("alone", {}), ("with shards", sharded()[0])):
        out = merged(zipped({**more, **files}, tmp_path / name), tmp_path / "out.safetensors")
        assert out.read_bytes() == weights


def test_checkpoints_side_by_side_are_refused(tmp_path: Path) -> None:
    """Two checkpoints side by side are refused as ambiguous; of several indexes the usual one is used."""
    folder = {"config.json": b"{}", "model.safetensors": save({"w": torch.ones(3)})}
    both = {f"{place}/{name}": content for place in ("a", "b") for name, content in folder.items()}
    with pytest.raises(InvalidFile, match="side by side, a, b") as caught:
        merged(zipped(both, tmp_path / "x"), tmp_path / "out")
    assert caught.value.members["folders"] == ["a", "b"]
    files, tensors = sharded()
    files["net/model.fp16.safetensors.index.json"] = b'{"weight_map": {"w": "model.fp16.safetensors"}}'
    assert load_file(merged(zipped(files, tmp_path / "x"), tmp_path / "out")).keys() == tensors.keys()


def without(name: str) -> Files:
    """Return the folder without a file."""
    files, _ = sharded()
    return {key: content for key, content in files.items() if not key.endswith(name)}


def changed(name: str, content: bytes) -> Files:
    """Return the folder with another content of a file."""
    files, _ = sharded()
    return {**files, f"net/{name}": content}


def cut(name: str, left: int) -> Files:
    """Return the folder with a file cut off after `left` bytes."""
    files, _ = sharded()
    return {**files, f"net/{name}": files[f"net/{name}"][:left]}


SECOND = "model-00002-of-00002.safetensors"


def in_both(more: Mapping[str, torch.Tensor]) -> Files:
    """Return the folder with these tensors in both shards, and the index unchanged."""
    files, tensors = sharded()
    shards = {}
    for shard, beginning in ((SECOND.replace("00002-", "00001-"), "a."), (SECOND, "b.")):
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(beginning)}
        shards[f"net/{shard}"] = save({**more, **own})
    return {**files, **shards}


@pytest.mark.parametrize("pack", [tarred, gzipped, zipped])
@pytest.mark.parametrize(
    "doubled", [["a.bias"], ["a.weight"], ["b.steps"], ["b.scale"], ["a.bias", "b.weight", "b.scale"]]
)
def test_the_index_says_whose_tensor_is_meant(tmp_path: Path, pack: Packer, doubled: list[str]) -> None:
    """If both shards hold a name with different numbers, the index decides, wherever the tensor stands."""
    tensors = sharded()[1]
    files = in_both({name: torch.full((3, 3), 9.0) for name in doubled})
    out = merged(pack(files, tmp_path / "net"), tmp_path / "out.safetensors")
    assert tensorfile.inspect_safetensors(out).tensors.keys() == tensors.keys()
    written = load_file(out)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("files", "words", "members"),
    [
        (without(SECOND), "1 shards that the folder does not hold", {"missing": [SECOND]}),
        (without(".index.json"), "2 safetensors files and no", {}),
        (without("safetensors"), "no safetensors file", {}),
        (changed("model.safetensors.index.json", b"[]"), "not a JSON object", {}),
        (changed("model.safetensors.index.json", b"{}"), "no weight_map", {}),
        (changed("config.json", b"{"), "not JSON", {}),
        (changed(SECOND, save({"b.weight": torch.ones(1)})), "2 tensors that are not in the shard", {}),
        (in_both({"more": torch.ones(1)}), "Two shards hold the tensor 'more'", {"tensor": "more"}),
        (cut(SECOND, 40), "a header of", {"file": SECOND}),
        (cut(SECOND, -10), "cut short", {"file": SECOND}),
        (changed(SECOND, b"nonsense" * 9), SECOND, {"file": SECOND}),
        ({"pytorch_model.bin": b"x", "config.json": b"{}"}, "interplay convert", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("pack", [tarred, zipped])
def test_what_does_not_fit_together_is_named(
    tmp_path: Path, files: Files, words: str, members: dict[str, Any], pack: Packer
) -> None:
    """Missing, duplicated, truncated or foreign shards and invalid descriptions are refused by name."""
    with pytest.raises(InvalidFile) as caught:
        merged(pack(files, tmp_path / "x"), tmp_path / "out")
    assert words in caught.value.detail
    assert members.items() <= caught.value.members.items()


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/evil.safetensors", "a/../../b.safetensors", "a\\b", "C:b", "a\nb"]
)
@pytest.mark.parametrize("pack", [tarred, zipped])
def test_paths_that_climb_out_are_refused(tmp_path: Path, name: str, pack: Packer) -> None:
    """Paths that leave the archive are refused, also beside a valid folder, and named."""
    with pytest.raises(InvalidFile, match=r"leads out of its folder|must be printable") as caught:
        merged(pack({**sharded()[0], name: b"x"}, tmp_path / "x"), tmp_path / "out")
    assert caught.value.members["member"] == name


def test_a_member_without_a_name_is_refused(tmp_path: Path) -> None:
    """A member without a name, which no archiver writes, is refused."""
    path = zipped({**sharded()[0], "x": b"x"}, tmp_path / "x")
    path.write_bytes(nameless(path.read_bytes()))
    with pytest.raises(InvalidFile, match="must be printable"):
        merged(path, tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    """Links and devices are refused whatever their target."""
    path = tarred(sharded()[0], tmp_path / "x.tar")
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("net/model.safetensors")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(InvalidFile, match=r"is a link|neither a file nor a folder"):
        merged(path, tmp_path / "out")


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    """Links are refused; a zip marks them by the Unix mode of a file."""
    path = zipped(sharded()[0], tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("net/model.safetensors")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InvalidFile, match="is a link"):
        merged(path, tmp_path / "out")


@pytest.mark.parametrize("pack", [gzipped, zipped])
def test_bombs_are_refused_before_they_unpack(tmp_path: Path, pack: Packer) -> None:
    """64 MiB of zeros in a few kilobytes are refused, and nothing of them is left."""
    path = pack({**sharded()[0], "net/zeros": bytes(2**26)}, tmp_path / "x")
    assert path.stat().st_size < 2**20
    with pytest.raises(InvalidFile, match="would unpack to more than"):
        merged(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [2**32, -512])
def test_headers_of_a_tar_are_bounded(tmp_path: Path, kind: bytes, size: int) -> None:
    """A long name of 4 GiB, or of negative length, is refused before it is read into memory."""
    info = tarfile.TarInfo("net/model.safetensors")
    info.type, info.size = kind, size
    header = info.tobuf(tarfile.GNU_FORMAT)
    (path := tmp_path / "x.tar").write_bytes(tarred({"a": b"a"}, tmp_path / "a").read_bytes()[:1024] + header)
    with pytest.raises(InvalidFile, match=rf"announces a header of {size} bytes"):
        merged(path, tmp_path / "out")


def test_members_are_counted_as_they_come(tmp_path: Path) -> None:
    """The limit counts members as they come, folders included; for a zip it uses the listed number."""
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for number in range(10_001):
            info = tarfile.TarInfo(f"f{number}")
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
    with pytest.raises(InvalidFile, match="more than 10000 members"):
        merged(tmp_path / "x.tar.gz", tmp_path / "out")
    content = bytearray(zipped(sharded()[0], path := tmp_path / "x.zip").read_bytes())
    for listed in (10_001, 60_000):
        content[-12:-10] = listed.to_bytes(2, "little")
        path.write_bytes(content)
        with pytest.raises(InvalidFile, match=f"lists {listed} files"):
            merged(path, tmp_path / "out")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_that_are_broken_are_refused(tmp_path: Path, mode: str) -> None:
    """Compressed tars with damaged bytes in the middle are refused, whatever the compression."""
    path = tarred(sharded()[0], tmp_path / "x", mode)
    assert merged(path, tmp_path / "out").stat().st_size > 0
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = bytes(byte ^ 255 for byte in content[middle : middle + 20])
    path.write_bytes(content)
    with pytest.raises(InvalidFile, match="cannot be read"):
        merged(path, tmp_path / "out")


@pytest.mark.parametrize("pack", [tarred, gzipped, zipped])
def test_archives_that_are_cut_are_refused(tmp_path: Path, pack: Packer) -> None:
    """A truncated archive is refused by one kind of error, or as another kind of file."""
    whole = pack(sharded()[0], tmp_path / "x").read_bytes()
    for share in (0.1, 0.3, 0.5):  # the rest of the tar holds nothing that is needed
        (path := tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InvalidFile):
            merged(path, tmp_path / "out")


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    """Safetensors of any header, a file of torch.save and an empty file are not archives."""
    (path := tmp_path / "x").write_bytes(save({"w": torch.ones(3)}))
    assert not is_archive(path)
    path.write_bytes(b"")
    assert not is_archive(path)
    # A header whose length begins like gzip's magic number, and zeros, which tar would take for its end.
    path.write_bytes((0x8B1F).to_bytes(8, "little") + b"{" + b" " * 0x8B1E)
    assert not is_archive(path)
    path.write_bytes(bytes(2**20))
    assert not is_archive(path)
    torch.save({"w": torch.ones(3)}, path)
    assert not is_archive(path)


def _adapter() -> dict[str, bytes]:
    """Return the files that PEFT's save_pretrained writes."""
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"]
    config = {"peft_type": "LORA", "base_model_name_or_path": "meta/llama", "r": 4}
    weights = save({name: torch.zeros(4, 4) for name in names})
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("place", ["", "run/"])
def test_an_adapter_is_refused_as_what_it_is(pack: Packer, place: str, tmp_path: Path) -> None:
    """An adapter is refused with its base network's name, also with pickled weights; beside a network it is ignored."""
    files = {place + name: content for name, content in _adapter().items()}
    pickled = {**files, place + "adapter_model.bin": b"PK"}
    del pickled[place + "adapter_model.safetensors"]
    for content in (files, pickled, {**files, place + "tokenizer.json": b"{}"}):
        with pytest.raises(InvalidFile, match=r"adapter \(LORA.*'meta/llama'.*merge_and_unload") as caught:
            _opened(pack(content, tmp_path / "archive"))
        assert caught.value.members == {"adapter": "LORA", "base": "meta/llama"}
    whole = {**files, place + "model.safetensors": save({"a": torch.zeros(2)})}
    assert _opened(pack(whole, tmp_path / "archive")) == ["model.safetensors"]


def test_a_folder_of_gguf_files_is_refused_as_what_it_is(tmp_path: Path) -> None:
    """A folder of GGUF files is refused as GGUF, not as one without safetensors."""
    with pytest.raises(InvalidFile, match=r"GGUF file .*'net-q4\.gguf'"):
        _opened(zipped({"net-q4.gguf": b"GGUF", "config.json": b"{}"}, tmp_path / "archive"))


def _opened(path: Path) -> list[str]:
    with open_folder(path, max_bytes=LIMIT) as folder:
        return list(folder.shards)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5 file"),
        (_adapter()["adapter_model.safetensors"], "an adapter"),
        (
            save({"base_model.model.a.lora_A.default.weight": torch.zeros(2), "m.modules_to_save.x": torch.zeros(2)}),
            "an adapter",
        ),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_at_the_push(service: Service, content: bytes, words: str) -> None:
    """A file that is not a checkpoint is refused at the push by its first bytes, or by the names of all its tensors."""
    spec = {
        "name": "a",
        "architecture": {"family": "transformers", "config": {"model_type": "a", "architectures": ["A"]}},
    }
    assert words in problem(service.post("/v1/checkpoints", spec, content), 422, "invalid-file")["detail"]


def test_a_network_with_such_parts_of_its_own_is_taken(service: Service) -> None:
    """A network with parts of these names is accepted if it has other tensors too."""
    content = save({"a.lora_A.weight": torch.zeros(2), "a.lora_B.weight": torch.zeros(2), "a.weight": torch.zeros(2)})
    spec = {"name": "a", "architecture": {"family": "custom", "name": "a", "args": {}}}
    assert service.post("/v1/checkpoints", spec, content).status_code == 201
