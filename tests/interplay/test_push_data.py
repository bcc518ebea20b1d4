"""Folders of images, Parquet and texts from the command line and the client, into a real service."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from interplay import Client, ProblemError
from interplay.folders import packed_checkpoint, zipped_folder
from tests.analysis import models
from tests.analysis.models import IMAGE_MODELS
from tests.datafiles import encoded, parquet, picture, saved
from tests.interplay.command.running import interplay
from tests.services import Service


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return two classes of three images, in splits, with the files that a camera and a file manager leave."""
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            place = tmp_path / "pets" / split / name
            place.mkdir(parents=True)
            for i in range(3):
                place.joinpath(f"{i}.png").write_bytes(encoded(picture(10 * number + i, 20, 20)))
    (tmp_path / "pets" / ".DS_Store").write_bytes(b"x")
    return tmp_path / "pets"


def _pushed(*arguments: str | Path, url: str) -> dict[str, Any]:
    ran = interplay("push", *arguments, "--json", url=url)
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout))


@pytest.mark.slow
def test_a_folder_of_class_folders(service: Service, folder: Path, tmp_path: Path) -> None:
    """A folder is zipped and a part of it analysed, with the checkpoint's own preprocessing."""
    probe = _pushed("probe", folder, url=service.url)
    assert (probe["name"], probe["format"], probe["class_names"]) == ("pets", "imagefolder", ["cat", "dog"])
    assert probe["splits"] == {"train": 6, "test": 6}
    vit = models.saved_transformers("ViT", IMAGE_MODELS["ViT"], tmp_path)
    config = saved(
        b'{"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_normalize": false}',
        tmp_path,
        "preprocessor_config.json",
    )
    architecture = json.dumps(vit.architecture)
    arguments = ("checkpoint", vit.path, "--architecture", architecture, "--preprocess", config)
    checkpoint = _pushed(*arguments, url=service.url)
    assert checkpoint["preprocess"]["resize"] == [32, 32]
    ran = interplay(
        "analyze", "--checkpoint", checkpoint["id"], "--probe", probe["id"], "--samples", "8", "--permutations", "0",
        "--wait", "--json", url=service.url,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    report = service.report(json.loads(ran.stdout))
    assert report["probe"]["samples"] == {"used": 8, "of": 12, "seed": 0}
    assert report["probe"]["preprocess_source"] == "checkpoint"


def test_a_folder_of_parquet_files(service: Service, tmp_path: Path) -> None:
    """A folder of Parquet files is one probe, with the report of a single file."""
    contents = [encoded(picture(seed, 32, 32)) for seed in range(12)]
    (tmp_path / "pets" / "data").mkdir(parents=True)
    for name, rows in (
        ("train-00000-of-00002", range(5)),
        ("train-00001-of-00002", range(5, 9)),
        ("test", range(9, 12)),
    ):
        columns = {"image": [contents[row] for row in rows], "label": [row % 2 for row in rows]}
        saved(parquet(columns, names={"label": ["cat", "dog"]}), tmp_path / "pets" / "data", f"{name}.parquet")
    probe = _pushed("probe", tmp_path / "pets", url=service.url)
    assert (probe["name"], probe["format"], probe["class_names"]) == ("pets", "parquet", ["cat", "dog"])
    assert (probe["splits"], probe["class_counts"]) == ({"train": 9, "test": 3}, [6, 6])
    order = [9, 10, 11, *range(9)]
    whole = {"image": [contents[row] for row in order], "label": [row % 2 for row in order]}
    split = ["test"] * 3 + ["train"] * 9
    single = _pushed("probe", saved(parquet({**whole, "split": split}), tmp_path, "whole"), url=service.url)
    vit = models.saved_transformers("ViT", IMAGE_MODELS["ViT"], tmp_path)
    with Client(service.url) as client:
        checkpoint = client.push_checkpoint(vit.path, name="vit", architecture=vit.architecture)
        analyses = [
            client.create_analysis(checkpoint_id=checkpoint["id"], probe_id=each["id"], options={"batch_size": 4})
            for each in (probe, single)
        ]
        reports = [service.report(client.wait(analysis["id"])) for analysis in analyses]
    assert reports[0]["splits"] == reports[1]["splits"]


def test_a_class_without_images_is_noticed(service: Service, folder: Path) -> None:
    """Empty folders are sent too."""
    (folder / "train" / "eel").mkdir()
    with Client(service.url) as client, pytest.raises(ProblemError, match="train/eel"):
        client.push_probe(folder, name="pets")


def test_columns_and_tokenizers_are_options(service: Service, tmp_path: Path) -> None:
    """`--column role=name` may be repeated; a tokenizer is a file or JSON."""
    file = saved(parquet({"review": ["good", "bad"], "verdict": ["yes", "no"]}), tmp_path, "reviews")
    refused = interplay("push", "probe", file, url=service.url)
    assert refused.returncode == 2
    assert "'review', 'verdict'" in refused.stderr
    tokenizer = saved(b'{"model": {"type": "WordLevel", "vocab": {}}}', tmp_path, "tokenizer.json")
    columns = ("--column", "text=review", "--column", "label=verdict")
    probe = _pushed("probe", file, *columns, "--tokenizer", tokenizer, "--max-length", "9", url=service.url)
    assert probe["columns"] == {"text": "review", "label": "verdict"}
    assert (probe["class_names"], probe["max_length"]) == (["no", "yes"], 9)
    assert probe["tokenizer_sha256"] is not None
    wrong = interplay("push", "probe", file, "--column", "review", url=service.url)
    assert (wrong.returncode, "ROLE=NAME" in wrong.stderr) == (2, True)


def test_zipped_folders(folder: Path) -> None:
    """Files are stored uncompressed, links are followed except in cycles, and the zip is deleted."""
    (folder / "train" / "dog" / "linked.png").symlink_to(folder / "train" / "cat" / "0.png")
    (folder / "train" / "round").symlink_to(folder)
    with zipped_folder(folder) as path:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            assert "train/dog/linked.png" in names
            assert not any(archive.getinfo(name).external_attr >> 28 == 0o12 for name in names)
            assert {archive.getinfo(name).compress_type for name in names} == {zipfile.ZIP_STORED}
        assert sorted(names)[:2] == ["test/cat/0.png", "test/cat/1.png"]
        assert len(names) == 13
    assert not path.exists()


def _copied(folder: Path, place: Path) -> Path:
    """Copy the folder in another order, with other times and permissions, and with a file manager's files."""
    for file in sorted(folder.rglob("*"), reverse=True):
        copy = place / file.relative_to(folder)
        if file.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
            copy.chmod(0o600)
            os.utime(copy, (2**31, 2**31))
    (place / "train" / ".DS_Store").write_bytes(b"other")
    return place


def test_a_folder_is_the_same_bytes_wherever_and_whenever(folder: Path, tmp_path: Path) -> None:
    """The zip depends on contents and names, not on times, permissions, locations or the order of a directory."""
    (folder / "train" / "eel").mkdir()
    copy = _copied(folder, tmp_path / "elsewhere" / "pets")
    with zipped_folder(folder) as first, zipped_folder(copy) as second:
        assert first.read_bytes() == second.read_bytes()
        with zipfile.ZipFile(first) as archive:
            assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    (copy / "test" / "cat" / "0.png").rename(copy / "test" / "cat" / "9.png")
    with zipped_folder(folder) as first, zipped_folder(copy) as second:
        assert first.read_bytes() != second.read_bytes()


def test_of_two_links_to_a_folder_the_first_by_name_is_followed(folder: Path) -> None:
    """The order of the directory does not matter."""
    (folder.parent / "real").mkdir()
    (folder.parent / "real" / "0.png").write_bytes(b"x")
    for name in ("z", "a", "m"):
        (folder / "train" / name).symlink_to(folder.parent / "real")
    with zipped_folder(folder) as path, zipfile.ZipFile(path) as archive:
        assert [name for name in archive.namelist() if name.endswith(("a/0.png", "m/0.png", "z/0.png"))] == [
            "train/a/0.png"
        ]


def test_a_checkpoints_folder_is_the_same_bytes_wherever_and_whenever(tmp_path: Path) -> None:
    """The tar of config and weights depends on contents and names alone."""
    for place, mode in (("one", 0o644), ("two", 0o600)):
        (tmp_path / place).mkdir()
        for name in ("model.safetensors", "config.json") if place == "one" else ("config.json", "model.safetensors"):
            (tmp_path / place / name).write_bytes(name.encode())
            (tmp_path / place / name).chmod(mode)
            os.utime(tmp_path / place / name, (mode, mode))
    with packed_checkpoint(tmp_path / "one") as first, packed_checkpoint(tmp_path / "two") as second:
        assert first.read_bytes() == second.read_bytes()


def test_texts_without_labels(service: Service, tmp_path: Path) -> None:
    """`--column label=` declares that no column holds labels."""
    file = tmp_path / "texts.csv"
    file.write_text("review,verdict\ngood,1\nbad,0\n")
    probe = _pushed("probe", file, "--column", "text=review", "--column", "label=", url=service.url)
    assert (probe["columns"], probe["n_classes"]) == ({"text": "review", "label": None}, 0)
