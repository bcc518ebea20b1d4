"""Hostile pickles: nothing is looked up or called, and reading always ends."""

import argparse
import datetime
import enum
import io
import os
import pickle
import pickletools
import random
import struct
import sys
import threading
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis.saving.conversion import ConversionError, read_weights
from analysis.saving.pickles import Inert, Key, Name, PickleError, Reference, read_pickle

# What Python says of itself when a pickle is obeyed, or what it names is run.
_TELLING = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.utime")
_watched = threading.local()


def _audit(event: str, _: Any) -> None:
    if (seen := getattr(_watched, "seen", None)) is not None and event in _TELLING:
        seen.append(event)


sys.addaudithook(_audit)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fail if Python's own unpickler looks a name up, or a command is run, inside the block."""
    _watched.seen = []
    try:
        yield
        assert _watched.seen == []
    finally:
        _watched.seen = None


def read(content: bytes, **how: Any) -> Any:
    with nothing_runs():
        return read_pickle(io.BytesIO(content), **how)


class Colour(enum.Enum):
    RED = 1


class State:
    """An instance with a state, whose class Python would need."""

    def __init__(self) -> None:
        self.rate = 0.5

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("nobody calls this")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_data_is_what_it_was(protocol: int) -> None:
    """Numbers, texts and containers, including shared and self-containing ones, in every protocol."""
    shared = ["x", 2.5, -(2**70), b"\x00\xff", "ä\n", None, True, (), {}]
    content = {"a": shared, "b": shared, 3: (1, 2, 3, 4), "o": OrderedDict(k=1), "c": Counter("aab")}
    content |= {"d": defaultdict(list, z=[1]), "s": {1}, "y": bytearray(b"ab")}
    found = read(pickle.dumps(content, protocol=protocol))
    assert found["a"] is found["b"]
    assert found["a"][:3] + found["a"][4:] == shared[:3] + shared[4:]
    assert found["a"][3] == b"\x00\xff" or isinstance(found["a"][3], Inert)  # by a call of _codecs.encode before 3
    assert (found[3], found["o"], found["c"], found["d"]) == ((1, 2, 3, 4), {"k": 1}, {"a": 2, "b": 1}, {"z": [1]})
    assert found["s"] == [1] or isinstance(found["s"], Inert)
    circle: list[Any] = []
    circle.append(circle)
    round_ = read(pickle.dumps(circle, protocol=protocol))
    assert round_[0] is round_


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_objects_are_their_names(protocol: int) -> None:
    """Objects of training scripts are read without their classes."""
    content = {
        "args": argparse.Namespace(lr=0.1),
        "path": Path("/data"),
        "metric": np.float64(91.2),
        "when": datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC),
        "colour": Colour.RED,
        "state": State(),
        "dtype": torch.float32,
        "range": range(3),
    }
    found = read(pickle.dumps(content, protocol=protocol))
    assert {key: type(value) for key, value in found.items()} == dict.fromkeys(found, Inert) | {"dtype": Name}
    assert (found["args"].name, found["args"].state) == ("argparse.Namespace", {"lr": 0.1})
    assert (found["path"].name, found["dtype"].text) == ("pathlib.PosixPath", "torch.float32")
    assert found["metric"].name.endswith("multiarray.scalar")
    assert (found["state"].name, found["state"].state) == (f"{__name__}.State", {"rate": 0.5})


class Does:
    """Its pickle calls a function."""

    def __init__(self, called: Any, *arguments: Any) -> None:
        self.called, self.arguments = called, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called, self.arguments


def hostile(trace: Path) -> dict[str, bytes]:
    """Return pickles that would create a file, each by another way."""
    shell, code = f"touch {trace}", f"open({str(trace)!r}, 'w')"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    return {
        "os.system": pickle.dumps(Does(os.system, shell)),
        "eval": pickle.dumps(Does(eval, code)),
        "exec": pickle.dumps(Does(exec, code)),
        "a method": pickle.dumps(Does(Path.touch, trace)),
        "getattr": pickle.dumps(Does(getattr, Path, "touch")),
        "global": b"cos\nsystem\n" + text(shell) + b"\x85R.",
        "instance": b"(" + text(shell) + b"ios\nsystem\n.",
        "object": b"(cos\nsystem\n" + text(shell) + b"o.",
        "new object": b"\x80\x02cos\nsystem\n" + text(shell) + b"\x85\x81.",
        "new object with names": b"\x80\x04cos\nsystem\n" + text(shell) + b"\x85}\x92.",
        "stack global": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(shell) + b"\x85R.",
        "stack global with dots": b"\x80\x04" + text("pathlib") + text("os.system") + b"\x93" + text(shell) + b"\x85R.",
        "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n(N}" + text("__code__") + b"Nstb.",
        "state of a class": b"ccollections\nOrderedDict\n}" + text("update") + b"cos\nsystem\nsb.",
        "extension": b"\x80\x02\x82\x01" + text(shell) + b"\x85R.",
        "persistent id": b"cos\nsystem\n" + text(shell) + b"\x86Q.",
        "nested torch file": pickle.dumps(Does(torch.storage._load_from_bytes, b"x")),
        "appended": pickle.dumps(Does(os.system, shell))[:-1] + text("x") + b"a.",
        "within a dictionary": pickle.dumps({"w": Does(os.system, shell)}),
        "as a key": b"}cos\nsystem\n" + text(shell) + b"\x85RNs.",
        "of a dictionary": b"ccollections\ndefaultdict\ncos\nsystem\n\x85R" + text(shell) + b"Ns.",
    }


NAMES = [*hostile(Path("x"))]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_run(tmp_path: Path, name: str) -> None:
    """As a bare pickle, and in both forms of torch.save: it is read as data, or refused."""
    content = hostile(tmp_path / "trace")[name]
    try:
        found = read(content)
    except PickleError:
        found = None
    assert not callable(found)
    legacy = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    (tmp_path / "legacy.pt").write_bytes(legacy + content + pickle.dumps([], 2))
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    (tmp_path / "bare.pkl").write_bytes(content)
    for file in ("legacy.pt", "zip.pt", "bare.pkl"):
        with nothing_runs(), pytest.raises(ConversionError):
            read_weights(tmp_path / file)
    assert not (tmp_path / "trace").exists()


def _long(opcode: bytes, n_bytes: int, width: str) -> bytes:
    return b"\x80\x04" + opcode + struct.pack(width, n_bytes) + b"x."


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02K\x01",
        b"\xff.",
        b"N\x85\x85b.",
        b"e.",
        b"h\x05.",
        b"(((.",
        b"}K\x01s.",
        b"}]s.",
        b"Na.",
        b"\x97.",
        b"\x80\x04NN\x93.",
        _long(b"X", 2**32 - 1, "<I"),
        _long(b"\x8d", 2**62, "<Q"),
        _long(b"\x8d", 2**64 - 1, "<Q"),
        _long(b"\x8e", 2**62, "<Q"),
        _long(b"\x96", 2**40, "<Q"),
        _long(b"\x8b", 2**31 - 1, "<i"),
        _long(b"T", -1, "<i"),
        b"I" + b"9" * 5000 + b"\n.",
        b"S'a\n.",
        b"c" + b"a" * 2**21,
    ],
    ids=lambda content: repr(content[:12]),
)
def test_damaged_pickles_are_refused(content: bytes) -> None:
    """Any announced size gives one kind of error and takes no memory."""
    with pytest.raises(PickleError):
        read(content)


def test_depth_costs_no_recursion() -> None:
    """Nested lists, as a value and as a key, and a tuple that doubles a hundred times."""
    depth = 5_000
    deep = read(b"]" + b"]" * depth + b"a" * depth + b".")
    for _ in range(1000):
        [deep] = deep
    del deep
    keyed = read(b"}" + b"]" + b"\x85" * depth + b"Ns.")
    assert [type(key) for key in keyed] == [Key]
    doubled = read(b"}K\x01" + b"2\x86" * 100 + b"Ns.")
    assert [type(key) for key in doubled] == [Key]


def test_steps_are_counted() -> None:
    """Opcodes count, and entries that one of them copies."""
    with pytest.raises(PickleError, match="more steps"):
        read(b"]" + b"0]" * 1000 + b".", most_steps=1000)
    entries = b"".join(b"K" + bytes([i]) + b"N" for i in range(100))
    again = b"h\x00h\x01\x85R0" * 100
    copied = b"ccollections\nOrderedDict\nq\x000}(" + entries + b"uq\x010" + again + b"N."
    assert read(copied) is None
    with pytest.raises(PickleError, match="more steps"):
        read(copied, most_steps=5000)


def test_references_are_all_told() -> None:
    """Also those that no object holds."""
    references: list[Reference] = []
    assert read(b"K\x01Q0K\x02QK\x03Q\x86.", references=references)
    assert [reference.id for reference in references] == [1, 2, 3]


def _mutated(content: bytes, rng: random.Random, opcodes: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(changed))
        kind = rng.randrange(4)
        if kind == 0:
            changed[place] = rng.randrange(256)
        elif kind == 1:
            changed[place:place] = bytes([rng.choice(opcodes)])
        elif kind == 2:
            del changed[place : place + rng.randrange(1, 9)]
        else:
            changed[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\x00\x00\x00\x00"))
    return bytes(changed)


def test_files_that_were_changed_at_random(tmp_path: Path) -> None:
    """Each of 200 damaged files is read, or refused with a printable message, and nothing is run."""
    weights = {"state_dict": {"w": torch.randn(3, 4), "n": torch.tensor(7)}, "args": argparse.Namespace(lr=0.1)}
    torch.save(weights, tmp_path / "zip")
    torch.save(weights, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    opcodes = b"".join(opcode.code.encode("latin-1") for opcode in pickletools.opcodes)
    rng, messages = random.Random(14), set()
    for number in range(200):
        if number % 3 == 0:
            with zipfile.ZipFile(tmp_path / "x", "w") as archive:
                for name, content in members.items():
                    changed = _mutated(content, rng, opcodes) if name.endswith("data.pkl") else content
                    archive.writestr(name, changed)
        else:
            whole = (tmp_path / ("zip", "legacy")[number % 3 - 1]).read_bytes()
            (tmp_path / "x").write_bytes(_mutated(whole, rng, opcodes))
        with nothing_runs():
            try:
                read_weights(tmp_path / "x")
            except ConversionError as error:
                messages.add(str(error))
    assert all(message.isprintable() for message in messages)
    assert len(messages) > 5
