"""Write the archive of a small network, as torch.export.save of this torch writes it; prints the network's logits.

    python make.py torch-2.13.0.pt2

The files beside this one came of torch 2.9.1 and 2.10.0 for aarch64, and 2.13.0 for x86-64. Traces of code, which name
the folders of the machine, were taken out of them.
"""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A network with most of what the form has: normalisation, lists, regions, constants, tied and strided tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.fc.weight
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]), persistent=False)
        self.shift = torch.tensor([1.0, 0.5, 0.25, 0.0])
        self.strided = nn.Parameter(torch.arange(8.0).view(2, 4).t() / 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu_(self.norm(self.conv(x)))
        a, b = x.chunk(2, 1)
        x = torch.cat([b, a], 1).mean((2, 3)) * self.scale + self.shift + self.strided.sum(1)
        with torch.autocast("cpu", enabled=False):
            x = x.masked_fill(x > 100.0, float("inf")).clamp(max=9.0)
        x = x + torch.arange(x.shape[0], device=x.device)[:, None].to(torch.float32) * 0
        return {"aux": x.sum(1), "logits": self.fc(x) + self.tied(x) * 0}


def made() -> nn.Module:
    """Return the network, with weights that need no random numbers."""
    net = Net().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.sin(torch.arange(float(parameter.numel()))).view(parameter.shape))
        statistics: Any = net.norm
        statistics.running_mean.copy_(torch.tensor([0.1, -0.1, 0.2, 0.0]))
        statistics.running_var.copy_(torch.tensor([1.0, 2.0, 0.5, 1.5]))
    return net


def inputs() -> Tensor:
    """Return three samples."""
    return torch.cos(torch.arange(3.0 * 108)).view(3, 3, 6, 6)


def without_traces(path: Path) -> None:
    """Take the traces of code out of an archive."""
    with zipfile.ZipFile(path) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in members:
            if info.filename.endswith("models/model.json"):
                whole = json.loads(content)
                _clear(whole["graph_module"]["graph"])
                content = json.dumps(whole).encode()
            archive.writestr(zipfile.ZipInfo(info.filename), content)


def _clear(graph: dict[str, Any]) -> None:
    for node in graph["nodes"]:
        node["metadata"] = {}
        for given in node["inputs"]:
            if "as_graph" in given["arg"]:
                _clear(given["arg"]["as_graph"]["graph"])


def main(path: Path) -> None:
    """Write the archive."""
    net = made()
    with torch.no_grad():
        shapes = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(net, (torch.ones(2, 3, 6, 6),), dynamic_shapes=shapes)
        print(torch.__version__, net(inputs())["logits"].flatten().tolist())
    torch.export.save(program, path)
    without_traces(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
