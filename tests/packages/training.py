"""A project's training script, which uses packages of its own and the installed `interplay`."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import analysis
import app
import interplay
import migrations
import workers
from interplay import InterplayLoss, capture_features, hdr_loss, mir_loss, save_checkpoint

FOLDER = Path(sys.argv[1])


class Network(nn.Module):
    """The network that the family `builtin` calls `mlp`, of sizes 8, 16 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16)])
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers[0](inputs).relu())
        return logits


for own in (analysis, app, migrations, workers):
    assert own.__doc__ == "The project's.", own
assert "site-packages" in (interplay.__file__ or ""), interplay.__file__

torch.manual_seed(0)
labels = torch.arange(60) % 3
inputs = torch.randn(60, 8) + 2 * nn.functional.one_hot(labels, 8)
model = Network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
criterion = InterplayLoss(mir_weight=0.1, hdr_weight=0.1)
losses: list[float] = []
for _ in range(20):
    features = model.layers[0](inputs).relu()
    loss = nn.functional.cross_entropy(model.head(features), labels) + criterion(features, model.head.weight, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
with torch.no_grad():
    measures = [measure(features, model.head.weight, labels) for measure in (mir_loss, hdr_loss)]
assert all(torch.isfinite(measure) for measure in measures), measures

description = {"family": "builtin", "name": "mlp", "args": {"sizes": [8, 16, 3]}}
save_checkpoint(model, FOLDER / "net.safetensors", architecture=description)
capture_features(model, "head", {"train": [(inputs, labels)]}, FOLDER / "features.safetensors")
torch.save(model.state_dict(), FOLDER / "net.pt")
print("trained")
