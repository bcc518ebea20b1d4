"""`interplay convert`: PyTorch files become files that push accepts."""

import argparse
import json
import shlex
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint import state_dict_saver as distributed

from analysis.networks.loading import build
from tests.interplay.command.running import interplay
from tests.services import Service


def test_convert_and_push(service: Service, tmp_path: Path) -> None:
    """A refused pickle comes with the command that converts it; the converted file is accepted."""
    architecture = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 12, 10]}}
    state = build(architecture, device="cpu").state_dict()
    torch.save({"epoch": 7, "state_dict": state, "optimizer": {}}, pickled := tmp_path / "net.ckpt")
    refused = interplay("push", "checkpoint", pickled, url=service.url)
    assert refused.returncode == 2
    assert "interplay convert FILE -o OUT.safetensors" in refused.stderr
    out = tmp_path / "net.safetensors"
    described = ("--architecture", json.dumps(architecture))
    converted = interplay("convert", pickled, "-o", out, *described)
    assert converted.returncode == 0, converted.stderr
    assert "4 tensors, 910 numbers under 'state_dict'" in converted.stdout
    assert "left out epoch: int" in converted.stdout
    again = interplay("convert", pickled, "-o", out)
    assert (again.returncode, "--overwrite" in again.stderr) == (2, True)
    as_json = interplay(
        "convert", pickled, "-o", out, "--overwrite", "--architecture", json.dumps(architecture), "--json"
    )
    assert json.loads(as_json.stdout)["left_out"] == {"epoch": "int", "optimizer": "dict of 0"}
    pushed = interplay("push", "checkpoint", out, "--json", url=service.url)
    assert json.loads(pushed.stdout)["n_parameters"] == 910


def test_convert_what_timm_saves(service: Service, tmp_path: Path) -> None:
    """Arguments and scalars beside the weights are listed as omitted; the weights are converted."""
    architecture = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 12, 10], "norm": "batch"}}
    state = build(architecture, device="cpu").state_dict()
    content = {"state_dict": state, "optimizer": {}, "args": argparse.Namespace(lr=0.1), "metric": np.float64(91.2)}
    torch.save(content, pickled := tmp_path / "x.pth.tar")
    out = tmp_path / "x.safetensors"
    converted = interplay("convert", pickled, "-o", out, "--architecture", json.dumps(architecture), "--json")
    assert converted.returncode == 0, converted.stderr
    body = json.loads(converted.stdout)
    assert body["n_tensors"] == len(state)
    assert body["left_out"] == {"optimizer": "dict of 0", "args": "argparse.Namespace", "metric": "numpy scalar"}
    pushed = interplay("push", "checkpoint", out, "--json", url=service.url)
    assert pushed.returncode == 0, pushed.stderr


def test_push_of_folders_of_pickles_says_the_command(service: Service, tmp_path: Path) -> None:
    """For a distributed checkpoint and a Hugging Face folder the suggested command makes a file that push accepts."""
    architecture = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 12, 10]}}
    state = build(architecture, device="cpu").state_dict()
    (tmp_path / "hugging face").mkdir()
    torch.save(state, tmp_path / "hugging face" / "pytorch_model.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed.save({"model": state}, checkpoint_id=tmp_path / "run" / "fsdp_0", no_dist=True)
    described = ("--architecture", json.dumps(architecture))
    for folder in ("hugging face", "run"):
        refused = interplay("push", "checkpoint", tmp_path / folder, *described, url=service.url)
        assert refused.returncode == 2
        _, _, command = refused.stderr.partition(": interplay convert ")
        source, _, target = shlex.split(command)
        ran = interplay("convert", source, "-o", tmp_path / target, *described)
        assert ran.returncode == 0, ran.stderr
        again = tmp_path / folder if folder == "hugging face" else tmp_path / target
        pushed = interplay("push", "checkpoint", again, *described, "--json", url=service.url)
        assert json.loads(pushed.stdout)["n_parameters"] == 910


def test_convert_says_what_it_cannot_open(tmp_path: Path) -> None:
    """A pickle of a whole network gives exit code 2 and advice, not a traceback."""
    torch.save(torch.nn.Linear(2, 2), path := tmp_path / "whole.pt")
    ran = interplay("convert", path, "-o", tmp_path / "x.safetensors")
    assert (ran.returncode, "Traceback" in ran.stderr) == (2, False)
    assert "state_dict()" in ran.stderr
    assert not (tmp_path / "x.safetensors").exists()
