"""Networks that the service has never seen, over HTTP, analysed by a real worker."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from interplay import save_checkpoint
from tests.app.api.test_uploads import problem
from tests.app.files.test_exported import PROGRAMS
from tests.services import Service, until

N, CLASSES = 40, 4


class Never(nn.Module):
    """A network of nobody's: convolution, attention, a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.stem(x))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return {"logits": self.out(x.mean(1))}


def _model(seed: int) -> Never:
    torch.manual_seed(seed)
    return Never().eval()


def _inputs() -> Tensor:
    return torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(0)) + (torch.arange(N) % 4).view(N, 1, 1, 1)


def _pushed(service: Service, file: bytes | Path, **spec: Any) -> dict[str, Any]:
    response = service.post("/v1/checkpoints", {"name": "net", **spec}, file)
    assert response.status_code == 201, response.text
    return dict(response.json())


def _archive(model: nn.Module) -> bytes:
    file = io.BytesIO()
    shapes = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(model, (_inputs()[:2],), dynamic_shapes=shapes), file)
    return file.getvalue()


def _probe(service: Service) -> str:
    tensors = {"inputs": _inputs(), "labels": torch.arange(N) % CLASSES}
    return str(service.post("/v1/probes", {"name": "probe"}, save(tensors)).json()["id"])


def _report(service: Service, **request: Any) -> dict[str, Any]:
    return service.report(service.wait(service.analyze(**request)["id"]))


def test_everything_works_on_a_network_that_nobody_knows(service: Service, tmp_path: Path) -> None:
    """Evaluation, comparison, path with alignment, pruning and series; a file of either kind is the same network."""
    models = [_model(seed) for seed in (0, 1)]
    first = _pushed(service, save_checkpoint(models[0], tmp_path / "a.safetensors", example_inputs=_inputs()[:2]))
    second = _pushed(service, _archive(models[1]))
    assert first["architecture"] == second["architecture"]
    assert first["architecture"]["inputs"] == [{"name": "x", "dtype": "float32", "shape": [None, 1, 6, 6]}]
    assert first["architecture"]["logits"] == [None, CLASSES]
    probe_id = _probe(service)
    for page in ("/checkpoints", f"/checkpoints/{first['id']}"):
        shown = service.client.get(page)
        assert shown.status_code == 200, shown.text
        assert first["architecture"]["graph"][:8] in shown.text
        # The service would refuse one.
        assert "Push an adapter of it" not in shown.text
    evaluated = _report(service, checkpoint_id=first["id"], probe_id=probe_id)
    with torch.no_grad():
        hits = models[0](_inputs())["logits"].argmax(1) == torch.arange(N) % CLASSES
    assert evaluated["splits"]["all"]["accuracy"] == pytest.approx(float(hits.float().mean()))
    assert evaluated["subject"]["head"] == "out"
    assert evaluated["provenance"]["library"] is None
    ends = {"checkpoint_a_id": first["id"], "checkpoint_b_id": second["id"], "probe_id": probe_id}
    options: dict[str, Any] = {"grid": {"points": 3}, "alignment": "weight_matching", "normalisation": "recalibrate"}
    path = _report(service, kind="path", options=options, **ends)
    assert [point["w"] for point in path["points"]] == [0, 0.5, 1]
    assert path["points"][0]["splits"]["all"]["accuracy"] == evaluated["splits"]["all"]["accuracy"]
    comparison = _report(service, kind="comparison", **ends)
    assert comparison["splits"]["all"]["differences"]["accuracy"] is not None
    options = {"sparsities": [0, 0.5]}
    swept = _report(service, kind="pruning", checkpoint_id=first["id"], probe_id=probe_id, options=options)
    assert swept["points"][1]["sparsity"] == 0.5
    ids, axis = [first["id"], second["id"]], {"name": "epoch", "values": [1, 2]}
    series = _report(service, kind="series", checkpoint_ids=ids, axis=axis, probe_id=probe_id)
    assert len(series["points"]) == 2


class Several(nn.Module):
    """Words and numbers, by names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.numbers, self.out = nn.Embedding(9, 8), nn.Linear(3, 8), nn.Linear(8, CLASSES)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.out(torch.relu(self.words(batch["words"]).mean(1) + self.numbers(batch["numbers"])))
        return logits


def test_inputs_may_have_any_names(service: Service, tmp_path: Path) -> None:
    """A probe has them as `inputs.NAME`; numbers that are whole stay whole."""
    torch.manual_seed(0)
    model, labels = Several(), torch.arange(N) % CLASSES
    batch = {"words": torch.randint(0, 9, (N, 5)), "numbers": torch.randn(N, 3)}
    checkpoint = _pushed(service, save_checkpoint(model, tmp_path / "a.safetensors", example_inputs=(batch,)))
    tensors = {f"inputs.{name}": tensor for name, tensor in batch.items()}
    probe = service.post("/v1/probes", {"name": "several"}, save({**tensors, "labels": labels}))
    report = _report(service, checkpoint_id=checkpoint["id"], probe_id=probe.json()["id"])
    accuracy = float((model.eval()(batch).argmax(1) == labels).float().mean())
    assert report["splits"]["all"]["accuracy"] == pytest.approx(accuracy)
    mixed = service.post(
        "/v1/probes", {"name": "mixed"}, save({**tensors, "inputs": torch.ones(N, 3), "labels": labels})
    )
    assert "it must be one or the other" in problem(mixed, 422, "invalid-file")["detail"]


def test_a_path_between_two_graphs_is_refused(service: Service) -> None:
    """The answer names the member that differs: the hash of the graph."""
    first, second = _pushed(service, _archive(_model(0))), _pushed(service, PROGRAMS / "torch-2.13.0.pt2")
    request = {"checkpoint_a_id": first["id"], "checkpoint_b_id": second["id"], "probe_id": _probe(service)}
    response = service.client.post("/v1/analyses", json={"kind": "path", **request})
    found = problem(response, 422, "architectures-differ")
    assert found["differing"][0]["member"] == "architecture.graph"


def test_a_graph_without_a_file_is_refused(service: Service) -> None:
    """A description of an exported network says nothing by itself."""
    file = save({"fc.weight": torch.zeros(2, 3)})
    spec = {"name": "net", "architecture": {"family": "exported", "graph": "0" * 64}}
    found = problem(service.post("/v1/checkpoints", spec, file), 422, "invalid-request")
    assert "This file holds no graph" in found["detail"]


def test_operations_that_no_worker_runs_are_named_at_the_push(service: Service, tmp_path: Path) -> None:
    """All of them, before an analysis is asked for."""
    import json

    from safetensors import safe_open

    until(lambda: "exported" in service.client.get("/v1/version").json()["workers"][0]["families"] or None)
    path = save_checkpoint(_model(0), tmp_path / "a.safetensors", example_inputs=_inputs()[:2])
    with safe_open(path, "pt") as file:
        graph = json.loads(file.metadata()["graph"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    graph["nodes"] = [["aten.bernoulli.default", {}, 0], ["os.system", {}, 0], *graph["nodes"]]
    damaged = save(tensors, metadata={"graph": json.dumps(graph)})
    found = problem(service.post("/v1/checkpoints", {"name": "net"}, damaged), 422, "invalid-request")
    assert found["operations"] == ["aten.bernoulli.default", "os.system"]
