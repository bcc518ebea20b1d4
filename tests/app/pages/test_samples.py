"""Samples of probes: pictures as the file has them, texts as text, and what is neither said so."""

import asyncio
import io
import json
import re
import struct
import zipfile
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.numpy import save

from app.files import pictures, samples, sampling
from app.files.pictures import as_png, media_type, size_of
from app.settings import Settings
from tests.app.pages.test_pages import read
from tests.datafiles import encoded, image_column, parquet, picture, png_of_size, saved, zipped
from tests.services import Service, running

SCRIPT = "<script>alert(1)"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


def pushed(service: Service, file: bytes, **spec: Any) -> str:
    """Push a probe; return its id."""
    response = service.post("/v1/probes", {"name": "probe", **spec}, file)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def shown(page: str) -> list[tuple[str, list[str]]]:
    """Return by class what its samples show: the address of a picture, or a text."""
    found = []
    for figure in re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL):
        name = re.search(r"<strong><bdi>(.*?)</bdi>", figure)
        items = re.findall(r"<li>(.*?)</li>", figure, re.DOTALL)
        texts = [re.sub(r'<img [^>]*src="([^"]+)".*', r"\1", item, flags=re.DOTALL) for item in items]
        texts = [unescape(re.sub("<[^>]*>", "", text)) for text in texts]
        found.append((unescape(name[1]) if name else "", texts))
    return found


def asked(format: str, content: str, **further: Any) -> sampling.Asked:
    """Return what the pages ask for a file."""
    limits = sampling.limits_of(Settings())
    return sampling.Asked(
        **{"format": format, "content": content, "columns": None, "class_names": None, "skipped": 0, "limits": limits}
        | further
    )


def test_class_folders(service: Service) -> None:
    """Five images of each of twenty classes, with the bytes of the file; the other classes are counted, and follow."""
    files = {f"{c:02d}/{i}.png": encoded(picture(100 * c + i, 12, 9)) for c in range(23) for i in range(4 + c % 3)}
    id_ = pushed(service, zipped(files, compression=zipfile.ZIP_DEFLATED))
    own = read(service.client, f"/probes/{id_}")
    assert f'data-samples="/probes/{id_}/samples"' in own
    assert "<img" not in own
    pages = [read(service.client, f"/probes/{id_}/samples{query}") for query in ("", "?first=20")]
    assert "Classes 1 to 20 of 23; 3 more are not shown here." in pages[0]
    assert f'rel="next" href="/probes/{id_}/samples?first=20"' in pages[0]
    classes = [*shown(pages[0]), *shown(pages[1])]
    assert [name for name, _ in classes] == [f"{c:02d}" for c in range(23)]
    for name, addresses in classes:
        expected = [content for path, content in sorted(files.items()) if path.startswith(f"{name}/")]
        assert len(addresses) == min(5, 4 + int(name) % 3)
        for address, content in zip(addresses, expected, strict=False):
            answer = service.client.get(address)
            assert answer.content == content
            assert answer.headers["content-type"] == "image/png"
    assert 'alt="07, 2" width="96" height="96" loading="lazy"' in pages[0]
    for number, why in (
        (4, "There is no sample 4"),
        (115, "no sample 115"),
        (200, "no such class"),
        (-1, "no such class"),
    ):
        assert why in read(service.client, f"/probes/{id_}/samples/{number}", status=404)
    assert "no such class" in read(service.client, f"/probes/{id_}/samples?first=40", status=404)


def test_what_is_no_picture_is_not_served(service: Service) -> None:
    """HTML, SVG, a format that no browser shows, and what is too large, are named and never sent."""
    good = [encoded(picture(1), format) for format in ("PNG", "JPEG", "GIF", "WEBP")]
    bad = [b"<!doctype html><script>alert(1)</script>", SVG, encoded(picture(2), "BMP"), png_of_size(40_000, 25_000)]
    bad.append(encoded(picture(3)) + bytes(3 * 2**20))
    files = {f"{SCRIPT}/{i}.png": content for i, content in enumerate(bad)}
    files |= {f"b/{i}.png": content for i, content in enumerate(good)}
    id_ = pushed(service, zipped(files), name=SCRIPT)
    page = read(service.client, f"/probes/{id_}/samples")
    assert SCRIPT not in page
    classes = dict(shown(page))
    assert list(classes) == [SCRIPT, "b"]
    for text, why in zip(
        classes[SCRIPT],
        ["is no PNG", "is no PNG", "is no PNG", "40000 × 25000 pixels", "too large to show"],
        strict=True,
    ):
        assert why in text
    for number in range(len(bad)):
        read(service.client, f"/probes/{id_}/samples/{number}", status=404)
    served = [service.client.get(address) for address in classes["b"]]
    assert [answer.headers["content-type"] for answer in served] == [
        "image/png",
        "image/jpeg",
        "image/gif",
        "image/webp",
    ]
    assert [answer.content for answer in served] == good
    for answer in served:
        assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_parquet_with_a_row_that_is_no_image(service: Service) -> None:
    """It is named; the others are shown, under the spec's names."""
    contents = [encoded(picture(i, 16, 16), "JPEG") for i in range(12)]
    contents[7] = b"broken"
    file = parquet({"image": image_column(contents), "label": [i % 2 for i in range(12)]})
    id_ = pushed(service, file, class_names=["even <&>", "odd"])
    (first, even), (second, odd) = shown(read(service.client, f"/probes/{id_}/samples"))
    assert (first, second) == ("even <&>", "odd")
    assert odd[3].startswith("Sample 4 is no PNG")
    for address, row in zip([*even, *odd[:3]], [0, 2, 4, 6, 8, 1, 3, 5], strict=True):
        assert service.client.get(address).content == contents[row]


def test_parquet_with_a_row_that_was_damaged(tmp_path: Path) -> None:
    """A row without an image is named, and the rows after it are read."""
    contents: list[bytes | None] = [encoded(picture(i, 16, 16)) for i in range(6)]
    contents[2] = None
    path = saved(parquet({"image": image_column(contents), "label": [i % 2 for i in range(6)]}), tmp_path)
    found = samples.read(path, asked("parquet", "images", columns={"image": "image", "label": "label"}))
    assert [one.fault for one in found.samples] == ["", "cannot be read", "", "", "", ""]
    assert [one.picture for one in found.samples] == [contents[0], b"", *(contents[i] for i in (4, 1, 3, 5))]


def test_a_corrupt_entry_of_a_zip(tmp_path: Path) -> None:
    """Its row is named, and the rows after it are read."""
    contents = [encoded(picture(i, 16, 16)) for i in range(4)]
    content = zipped({f"{'ab'[i % 2]}/{i}.png": one for i, one in enumerate(contents)})
    at = content.index(contents[2]) + 20
    path = saved(content[:at] + bytes((content[at] ^ 1,)) + content[at + 1 :], tmp_path)
    found = samples.read(path, asked("imagefolder", "images"))
    assert [(one.label, one.place, one.fault) for one in found.samples] == [
        (0, 0, ""), (0, 1, "cannot be read"), (1, 0, ""), (1, 1, ""),
    ]  # fmt: skip
    assert [one.picture for one in found.samples] == [contents[0], b"", contents[1], contents[3]]


def test_texts_with_and_without_labels(service: Service) -> None:
    """Three texts of each class, cut, on one line each and as text; of texts without labels the first ten."""
    texts = [f"{SCRIPT}</script> \u202e line\n\ttext {i} " + "long " * 200 for i in range(30)]
    rows = [{"text": text, "label": ["sad", "glad"][i % 2]} for i, text in enumerate(texts)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    id_ = pushed(service, lines)
    page = read(service.client, f"/probes/{id_}/samples")
    assert SCRIPT not in page
    assert "\u202e" not in page
    (glad, some), (sad, others) = shown(page)
    assert (glad, sad, len(some), len(others)) == ("glad", "sad", 3, 3)
    assert " line text 1 long long" in some[0]
    assert " line text 4 long" in others[2]
    assert {len(text) for text in [*some, *others]} == {301}
    read(service.client, f"/probes/{id_}/samples/0", status=404)
    unlabelled = pushed(service, parquet({"text": [f"line {i}" for i in range(50)]}))
    assert shown(read(service.client, f"/probes/{unlabelled}/samples")) == [("", [f"line {i}" for i in range(10)])]


@pytest.mark.parametrize(
    ("format", "shape"),
    [("safetensors", (8, 9)), ("safetensors", (3, 8, 9)), ("npz", (1, 8, 9)), ("npz by columns", (8, 9))],
)
def test_tensors_that_can_be_pictures(service: Service, format: str, shape: tuple[int, ...]) -> None:
    """They are PNGs from the smallest to the largest number; an array that lies by columns is not read."""
    inputs = np.random.default_rng(0).normal(size=(12, *shape)).astype(np.float32)
    inputs[5, ..., 0] = np.inf
    arrays: dict[str, Any] = {"inputs": inputs, "labels": np.arange(12) % 3}
    if format == "safetensors":
        content = save(arrays)
    else:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays if format == "npz" else arrays | {"inputs": np.asfortranarray(inputs)})
        content = buffer.getvalue()
    id_ = pushed(service, content)
    page = read(service.client, f"/probes/{id_}/samples")
    if format == "npz by columns":
        assert "by columns" in page
        assert shown(page) == []
        return
    assert 'class="sample pixels"' in page
    for label, (_, addresses) in enumerate(shown(page)):
        for place, address in enumerate(addresses):
            sample = inputs[label + 3 * place]
            pixels = np.asarray(Image.open(io.BytesIO(service.client.get(address).content)))
            wide = sample.transpose(1, 2, 0) if shape[0] == 3 else sample.reshape(8, 9)
            known = wide[np.isfinite(wide)]
            levels = (np.where(np.isfinite(wide), wide, known.min()) - known.min()) / (known.max() - known.min()) * 255
            np.testing.assert_allclose(pixels, levels, atol=0.51)


def test_other_tensors_have_no_samples(service: Service) -> None:
    """Rows of numbers, and pictures of other sides, are not shown, and their pages say nothing of samples."""
    for shape in ((64,), (2, 8, 8), (8, 300), (3, 2, 8)):
        arrays: dict[str, Any] = {"inputs": np.zeros((4, *shape), np.float32), "labels": np.arange(4) % 2}
        id_ = pushed(service, save(arrays))
        assert "Samples</h2>" not in read(service.client, f"/probes/{id_}")
        read(service.client, f"/probes/{id_}/samples", status=404)
    unknown = "0" * 8 + "-0000-0000-0000-" + "0" * 12
    assert "There is no probe" in read(service.client, f"/probes/{unknown}/samples", status=404)


def test_a_file_that_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that crashes the reader leaves a sentence, and so does one that takes too long; no process stays."""
    whole = parquet({"text": ["a", "b"] * 50, "label": ["x", "y"] * 50})
    nullable = b"\x25\x02\x18\x05label"
    assert whole.count(nullable) == 1
    # A column declared never null, with statistics of a null.
    path = saved(whole.replace(nullable, b"\x25\x00" + nullable[2:]), tmp_path)
    wanted = asked("parquet", "texts", columns={"text": "text", "label": "label"})
    assert "was ended by what it holds" in asyncio.run(sampling.read_apart(path, wanted)).fault
    monkeypatch.setattr(sampling, "MOST_SECONDS", 0.05)
    assert "took more than" in asyncio.run(sampling.read_apart(path, wanted)).fault
    assert not [one for one in psutil.Process().children() if "app.files.samples" in one.cmdline()]


def test_reading_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read by then is shown, and it is said that more was not."""
    content = zipped({f"{c}/{i}.png": encoded(picture(i)) for c in "ab" for i in range(5)})
    monkeypatch.setattr(samples, "_ENOUGH_SECONDS", 0.0)
    found = samples.read(saved(content, tmp_path), asked("imagefolder", "images"))
    assert (len(found.samples), found.fault[:18]) == (1, "9 further samples ")


def test_large_pictures_leave_room_for_other_classes(tmp_path: Path) -> None:
    """Each class has its part of what a page may hold."""
    large = encoded(picture(1)) + bytes(1_900_000)
    files = {f"{c}/{i}.png": large if c else encoded(picture(i)) for c in range(8) for i in range(3)}
    found = samples.read(saved(zipped(files), tmp_path), asked("imagefolder", "images"))
    faults = [one.fault[:11] for one in found.samples]
    assert faults == ["", "", "", *["", "", "is left out"] * 7]
    assert [bool(one.picture) for one in found.samples] == [not fault for fault in faults]


def test_samples_are_for_people_who_have_logged_in(tmp_path: Path) -> None:
    """With a key, neither the page nor a picture is there without a session; a call's key is no session."""
    with running(tmp_path / "data", command="api", api_key="secret") as service:
        service.client.headers["Authorization"] = "Bearer secret"
        id_ = pushed(service, zipped({"a/0.png": encoded(picture(0)), "b/0.png": encoded(picture(1))}))
        with httpx.Client(base_url=service.url, trust_env=False, timeout=30) as stranger:
            for path in (f"/probes/{id_}/samples", f"/probes/{id_}/samples/0"):
                answer = stranger.get(path)
                assert answer.status_code == 303
                assert answer.headers["location"].startswith("/login?next=")
                assert answer.content == b""


@pytest.mark.slow
def test_of_a_remote_store_small_files_are_fetched(tmp_path: Path) -> None:
    """A large one is not fetched for a look, and the page says why there are no samples."""
    contents = {f"{name}/0.png": encoded(picture(0)) for name in "ab"}
    with running(tmp_path / "data", command="api", storage_url="memory:///") as service:
        small = pushed(service, zipped(contents))
        ((_, [address]), _) = shown(read(service.client, f"/probes/{small}/samples"))
        assert service.client.get(address).content == contents["a/0.png"]
        large = pushed(service, zipped(contents | {"a/1.png": bytes(65 * 2**20)}))
        page = read(service.client, f"/probes/{large}/samples")
        assert "lies in a remote store; more than 64.0 MiB are not fetched for a look" in page
        assert shown(page) == []


def test_sizes_that_pictures_announce() -> None:
    """They are Pillow's, for all formats and modes; what is cut short has none, and fails nothing."""
    for width, height in ((1, 1), (40, 32), (300, 257)):
        drawn = picture(3, width, height)
        contents = [encoded(drawn), encoded(drawn, "GIF"), encoded(drawn, "JPEG", progressive=True)]
        contents += [encoded(drawn, "JPEG", icc_profile=bytes(200_000), comment=b"x" * 1000)]
        contents += [encoded(drawn, "WEBP", lossless=lossless) for lossless in (False, True)]
        contents += [encoded(drawn.convert("RGBA"), "WEBP", exif=b"Exif\0\0" + bytes(20))]
        for content in contents:
            assert size_of(content) == (width, height), content[:40]
            for end in range(40):
                assert size_of(content[:end]) in (None, (width, height))
    assert size_of(b"\xff\xd8\xff" + b"\xff" * 2**20) is None
    assert size_of(b"\xff\xd8" + b"\xff\xe0\x00\x02" * 2**18) is None
    assert media_type(SVG) is None


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[np.nan, np.inf]], [[-1e308, 1e308]], [[np.nan, 1.0]]], ids=str)
def test_numbers_without_a_span(values: list[list[float]]) -> None:
    """One value, values that are none, and the largest there are, still make a picture."""
    content = as_png(np.array(values))
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    assert pixels.tolist() == [[0, 255 if values[0][1] == 1e308 else 0]]
    assert struct.unpack(">II", content[16:24]) == pictures.size_of(content) == (2, 1)
