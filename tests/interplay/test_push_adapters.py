"""Adapters from the command line and the client, onto a base that a real service holds."""

import json
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from interplay import Client, ProblemError
from tests.datafiles import mlp_adapter
from tests.interplay.command.running import interplay, message
from tests.services import Service


@pytest.fixture
def base(service: Service, mlp_checkpoint_file: Path) -> dict[str, Any]:
    """A network with a name of its own."""
    answer = service.post("/v1/checkpoints", {"name": f"base-{uuid4().hex}"}, mlp_checkpoint_file)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def test_the_command_takes_the_name_of_the_base(service: Service, base: dict[str, Any], tmp_path: Path) -> None:
    """A folder, or the tensors beside their configuration, go onto a base by its name, its id or the id's beginning."""
    folder = mlp_adapter(tmp_path / "tuned")
    (folder / "README.md").write_text("of PEFT")
    for named in (base["name"], base["id"], base["id"][:8]):
        for file in (folder, folder / "adapter_model.safetensors"):
            ran = interplay("push", "checkpoint", file, "--base", named, "--json", url=service.url)
            assert ran.returncode == 0, ran.stderr
            pushed = json.loads(ran.stdout)
            assert (pushed["base_id"], pushed["adapter"]["kind"], pushed["adapter"]["rank"]) == (base["id"], "lora", 2)
            assert pushed["name"] == file.stem
    said = interplay("push", "checkpoint", folder, "--base", base["id"], "--name", "mine", url=service.url)
    assert f"mine, {base['n_parameters']:,} parameters, lora adapter of rank 2, base {base['id']}" in said.stdout


def test_the_command_says_what_is_missing(service: Service, base: dict[str, Any], tmp_path: Path) -> None:
    """Without its base, its configuration or its tensors an adapter's folder is refused with what to do."""
    folder = mlp_adapter(tmp_path / "tuned")
    alone = interplay("push", "checkpoint", folder, url=service.url)
    assert alone.returncode == 2
    assert f"interplay push checkpoint {folder} --base NAME" in message(alone)
    nobody = interplay("push", "checkpoint", folder, "--base", "nobody", url=service.url)
    assert nobody.returncode == 2
    assert "there is no checkpoint with the name or id 'nobody'" in message(nobody)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "adapter_model.safetensors", bare)
    for file, said in ((bare, "contains no adapter_config.json"), (bare / "adapter_model.safetensors", "no 'adapter'")):
        ran = interplay("push", "checkpoint", file, "--base", base["id"], url=service.url)
        assert ran.returncode == 2
        assert said in message(ran)
    (bare / "adapter_config.json").write_text("[]")
    broken = interplay("push", "checkpoint", bare / "adapter_model.safetensors", "--base", base["id"], url=service.url)
    assert broken.returncode == 2
    assert "is no JSON object" in message(broken)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    pickled = interplay("push", "checkpoint", folder, "--base", base["id"], url=service.url)
    assert pickled.returncode == 2
    converted = f"{folder / 'adapter_model.bin'} -o {folder / 'adapter_model.safetensors'}"
    assert f"interplay convert {converted}" in message(pickled)


def test_the_client_takes_the_id_of_the_base(service: Service, base: dict[str, Any], tmp_path: Path) -> None:
    """The configuration is that in the folder, beside the file, or the one given; a known file is not sent again."""
    folder = mlp_adapter(tmp_path / "tuned", seed=uuid4().int % 2**32)
    tensors = folder / "adapter_model.safetensors"
    given = {**json.loads((folder / "adapter_config.json").read_text()), "use_rslora": True}
    with Client(service.url) as client:
        first, sent = client.push_checkpoint_once(tensors, name="a", base=base["id"])
        assert (sent, first["base_id"]) == (True, base["id"])
        again, sent = client.push_checkpoint_once(tensors, name="a", base=base["id"])
        assert (sent, again["adapter"], again["sha256"]) == (False, first["adapter"], first["sha256"])
        other = client.push_checkpoint(tensors, name="a", base=base["id"], adapter=given)
        assert other["adapter"] is not None
        assert other["adapter"]["kind"] == "rslora"
        assert client.push_checkpoint(folder, name="a", base=base["id"])["adapter"] == first["adapter"]
        with pytest.raises(ProblemError, match="is an adapter itself"):
            client.push_checkpoint(folder, name="a", base=first["id"])
