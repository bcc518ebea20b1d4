"""Every measure computed the naive way: whole N x N Gram matrices, explicit loops, NumPy in float64."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Numbers:
    """Entropies, MIR and HDR."""

    features: float
    head: float
    joint: float
    mir: float | None
    hdr: float | None


def entropy(gram: Array) -> float:
    """Return - sum l log l over the eigenvalues of K/n."""
    eigenvalues = np.linalg.eigvalsh(gram / len(gram))
    positive = eigenvalues[eigenvalues > 1e-15]
    return float(-(positive * np.log(positive)).sum())


def numbers(z: Array, v: Array) -> Numbers:
    """Return entropies, MIR and HDR of pairs of rows, which are divided by their lengths."""
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    v = v / np.linalg.norm(v, axis=1, keepdims=True)
    first, second = z @ z.T, v @ v.T
    h1, h2, joint = entropy(first), entropy(second), entropy(first * second)
    smaller, larger = min(h1, h2), max(h1, h2)
    mir = (h1 + h2 - joint) / smaller if smaller >= 1e-12 else None
    return Numbers(h1, h2, joint, mir, abs(h1 - h2) / larger if larger >= 1e-12 else None)


def class_means(features: Array, labels: Labels) -> tuple[Array, Labels]:
    """Return the means of the classes present, and the numbers of these classes."""
    present = np.unique(labels)
    return np.stack([features[labels == c].mean(axis=0) for c in present]), present


def interplay(features: Array, labels: Labels, head: Array, level: str, centring: str) -> Numbers:
    """Return MIR and HDR at a level and centring, of vectors that all have a direction."""
    means, present = class_means(features, labels)
    if centring == "global":
        features, head = features - means.mean(axis=0), head - head.mean(axis=0)
        means = means - means.mean(axis=0)
    return numbers(features, head[labels]) if level == "sample" else numbers(means, head[present])


def collapse(features: Array, labels: Labels, head: Array, predicted: Labels) -> dict[str, float]:
    """Return NC1 to NC4, for d >= C - 1 and means of full rank."""
    means, present = class_means(features, labels)
    k = len(present)
    centred, rows = means - means.mean(axis=0), head - head.mean(axis=0)
    within = np.zeros((features.shape[1],) * 2)
    for mean, c in zip(means, present, strict=True):
        deviations = features[labels == c] - mean
        within += deviations.T @ deviations / len(deviations) / k
    between = centred.T @ centred / k
    values, vectors = np.linalg.eigh(between)
    leading = slice(len(values) - min(k - 1, len(values)), None)
    inverse = vectors[:, leading] @ np.diag(1 / values[leading]) @ vectors[:, leading].T
    result = {
        "nc1": float(np.trace(within @ inverse)) / k,
        "nc1_condition": float(values[leading].max() / values[leading].min()),
    }
    for name, matrix in (("means", centred), ("head", rows)):
        norms = np.linalg.norm(matrix, axis=1)
        cosines = [
            matrix[i] @ matrix[j] / norms[i] / norms[j]
            for i in range(len(matrix))
            for j in range(len(matrix))
            if i != j
        ]
        result[f"nc2_equinorm_{name}"] = float(norms.std() / norms.mean())
        result[f"nc2_equiangularity_{name}"] = float(np.std(cosines))
        result[f"nc2_max_angle_{name}"] = float(np.mean(np.abs(np.array(cosines) + 1 / (len(matrix) - 1))))
    w, m = rows[present], centred
    result["nc3"] = float(((w / np.linalg.norm(w) - m / np.linalg.norm(m)) ** 2).sum())
    nearest = [present[np.argmin(((means - sample) ** 2).sum(axis=1))] for sample in features]
    result["nc4"] = float(np.mean(np.array(nearest) != predicted))
    return result
