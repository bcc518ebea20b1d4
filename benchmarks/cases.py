"""The measured cases: synthetic features of a power-law spectrum, random small cases, features of a trained network."""

import math
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

# Distance of the class means from the centre, over the size of a class: loose, as midway through training, and tight.
COLLAPSE = {"loose": 1.0, "partial": 3.0, "tight": 10.0}


@dataclass(frozen=True)
class Case:
    """Features, labels and head under a name."""

    name: str
    features: Tensor
    labels: Tensor
    head: Tensor


def power_law(n: int, d: int, n_classes: int, separation: float, *, exponent: float = 2.0, seed: int = 0) -> Case:
    """Draw features around random class means, with covariance eigenvalues near k^-exponent and a head near the means.

    Half of each class's covariance is in directions that all classes share, half in its own.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=generator)
    scales = torch.arange(1, d + 1).float().pow(-exponent / 2)
    scales /= scales.norm()
    features = torch.randn(n, d, generator=generator) * scales * math.sqrt(0.5)
    for c in range(n_classes):
        rows = (labels == c).nonzero()[:, 0]
        order = torch.randperm(d, generator=generator)
        features[rows] += torch.randn(len(rows), d, generator=generator) * (scales * math.sqrt(0.5))[order]
    means = nn.functional.normalize(torch.randn(n_classes, d, generator=generator), dim=1) * separation
    head = means + 0.3 * separation / math.sqrt(d) * torch.randn(n_classes, d, generator=generator)
    return Case(f"power law {exponent:g}, separation {separation:g}", features + means[labels], labels, head)


def tokens(n: int, d: int, vocabulary: int, *, seed: int = 0) -> Case:
    """Draw features like a language model's: tokens by Zipf's law, many occurring once; classes are occurring tokens.

    Features are midway between their token's direction and an unrelated state.
    """
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, vocabulary + 1).float()
    drawn = torch.multinomial(frequencies, n, replacement=True, generator=generator)
    present = drawn.bincount(minlength=vocabulary) > 0
    labels = (present.cumsum(0) - 1)[drawn]
    scales = torch.arange(1, d + 1).float().pow(-0.5)
    scales /= scales.norm()
    head = torch.randn(int(present.sum()), d, generator=generator) * scales
    features = head[labels] + torch.randn(n, d, generator=generator) * scales
    return Case(f"tokens of {vocabulary:,} by Zipf's law", features, labels, head)


def random_case(seed: int) -> Case:
    """Draw one of the random cases on which error estimates are checked: 1,000 to 3,000 samples, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    n, d, n_classes = round(draw(1000, 3000)), round(draw(40, 400)), round(math.exp(draw(math.log(3), math.log(100))))
    separation, exponent = math.exp(draw(math.log(0.2), math.log(10))), draw(0.0, 2.5)
    case = power_law(n, d, n_classes, separation, exponent=exponent, seed=seed)
    return Case(f"random {seed}", case.features.double(), case.labels, case.head.double())


def trained_network(n: int, d: int, epochs: int = 15) -> Case:
    """Train a perceptron of the demo's kind, 64 - d - d - 10, on the digits; return its features of n jittered digits.

    The demo's own networks have at most 64 features, for which the exact spectrum is small.
    """
    generator = torch.Generator().manual_seed(0)
    images, targets = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(targets)
    network = nn.Sequential(nn.Linear(64, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 10))
    with torch.no_grad():
        for parameter in network.parameters():
            bound = 1 / math.sqrt(parameter.shape[-1])
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(labels), generator=generator), 64):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(network(inputs[rows]), labels[rows]))
            optimizer.step()
    rows = torch.randint(len(labels), (n,), generator=generator)
    with torch.no_grad():
        jittered = inputs[rows] + 0.1 * torch.randn(n, 64, generator=generator)
        features = network[:-1](jittered)
    return Case(f"trained on digits, d={d}", features, labels[rows], network.get_parameter("4.weight").detach().clone())
