"""Damaged files: an analysis fails, and `interplay verify` lists the affected reports."""

import json
import subprocess
import sys
from pathlib import Path

from tests.campaigns import on_one_database
from tests.datafiles import mlp_adapter
from tests.services import Service


def _verify(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app", "verify", *arguments]
    return subprocess.run(command, env=service.environment, capture_output=True, text=True, check=False, timeout=120)


@on_one_database
def test_a_damaged_checkpoint(
    any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, tmp_path: Path
) -> None:
    """A damaged checkpoint fails its next analysis and is listed with all reports that rest on it, those of adapters
    too; set aside, it can be sent again."""
    service = any_service
    # A separate file, so that no other test's checkpoint is damaged.
    content = bytearray(mlp_checkpoint_file.read_bytes())
    content[-1] ^= 1
    checkpoint = service.post("/v1/checkpoints", {"name": "rotten"}, bytes(content)).json()
    probe = service.post("/v1/probes", {"name": "digits"}, digits_probe_file).json()
    ids = {"checkpoint_id": checkpoint["id"], "probe_id": probe["id"]}
    options = {"null_permutations": 0}
    report = service.report(service.wait(service.analyze(**ids, options=options)["id"]))
    folder = mlp_adapter(tmp_path)
    described = json.loads((folder / "adapter_config.json").read_text())
    spec = {"name": "tuned", "base_id": checkpoint["id"], "adapter": described}
    adapter = service.post("/v1/checkpoints", spec, folder / "adapter_model.safetensors").json()["id"]
    of_adapter = service.report(
        service.wait(service.analyze(**{**ids, "checkpoint_id": adapter}, options=options)["id"])
    )
    assert _verify(service).returncode == 0

    path = service.data_dir / "blobs" / checkpoint["sha256"][:2] / checkpoint["sha256"]
    path.write_bytes(bytes(content[:-1]) + bytes([content[-1] ^ 2]))
    # Another batch size: cached features would not need the file.
    failed = service.wait(service.analyze(**ids, options={**options, "batch_size": 7})["id"])
    assert failed["problem"]["type"] == "urn:interplay:problem:blob-damaged"
    assert failed["problem"]["sha256"] == checkpoint["sha256"]
    found = _verify(service, "--set-aside")
    assert found.returncode == 1
    assert f"checkpoint rotten ({checkpoint['id']})" in found.stdout
    assert f"report {report['id']} rests on it" in found.stdout
    assert f"checkpoint tuned ({adapter})" in found.stdout
    assert f"report {of_adapter['id']} rests on it" in found.stdout
    assert json.dumps(found.stdout).count("rests on it") == 2
    assert "1 damaged or missing" in found.stdout

    spec = {"name": "rotten", "sha256": checkpoint["sha256"]}
    assert service.post("/v1/checkpoints", spec).status_code == 404
    assert "missing" in _verify(service).stdout
    assert service.post("/v1/checkpoints", spec, bytes(content)).status_code == 201
    assert _verify(service).returncode == 0
    again = service.wait(service.analyze(**ids, options={**options, "batch_size": 7})["id"])
    assert again["status"] == "succeeded"
    (service.data_dir / "blobs" / "damaged" / checkpoint["sha256"]).unlink()
