"""The joint matrix in the coordinates of z (x) v: the exact route for many samples and classes in few dimensions.

K1 * K2 is the Gram matrix of the vectors z_i (x) v_i. In a basis of the span of the z, of p vectors, and one of the
span of the v, of r, they have p r coordinates. The non-zero eigenvalues of K1 * K2 / n are therefore those of the
p r x p r matrix

    sum_i (z_i z_i^T) (x) (v_i v_i^T) / n = sum_c G_c (x) (v_c v_c^T) / n,   G_c the sum of z z^T over class c,

however many samples and classes there are.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .entropy import spectrum_rank

# Most numbers of class Gram matrices held at a time.
_NUMBERS = 2**22


def product_matrix(
    rows: Float64[Tensor, "m d"], sizes: Sequence[int], head: Float64[Tensor, "c d"], n: int
) -> Float64[Tensor, "pr pr"]:
    """Return the matrix whose non-zero eigenvalues are those of K1 * K2 / n.

    Args:
        rows: of all classes, one after the other: the z of a class, or any rows with the same sum of z z^T.
        sizes: number of rows of each class.
        head: direction of each class.
        n: number of z.

    Returns:
        Its lower triangle, which is all that `torch.linalg.eigvalsh` reads; entries above it are not set.

    Numerics: float64. Directions with less than 16 eps of the largest eigenvalue are not in a basis. O(m p^2 +
        c p^2 r^2 / 2) time in addition to the two bases; memory for the matrix and a quarter of it.
    """
    first, second = coordinates(rows), coordinates(head)
    p, r = first.shape[1], second.shape[1]
    upper = upper_places(p, first.device)
    sums = first.new_zeros(r * (r + 1) // 2, len(upper))
    parts = torch.split(first, list(sizes))
    at_a_time = max(_NUMBERS // (p * (p + max(sizes)) + len(sums)), 1)
    for start in range(0, len(parts), at_a_time):
        some = slice(start, start + at_a_time)
        by_class = pad_sequence(list(parts[some]), batch_first=True)
        sums += pairs_of(second[some]).T @ (by_class.mT @ by_class).flatten(1).index_select(1, upper)
    return assembled(sums / n, r, p)


def coordinates(vectors: Float64[Tensor, "n d"]) -> Float64[Tensor, "n r"]:
    """Return vectors in an orthonormal basis of their span; only products between them are preserved.

    Args:
        vectors: one a row.

    Returns:
        Their coordinates, in the order of rising shares; r is their numerical rank.
    """
    n, d = vectors.shape
    values, basis = torch.linalg.eigh(vectors @ vectors.T if n <= d else vectors.T @ vectors)
    rank = spectrum_rank(values)
    leading = basis[:, len(values) - rank :]
    found: Float64[Tensor, "n r"] = leading * values[len(values) - rank :].sqrt() if n <= d else vectors @ leading
    return found


def pairs_of(coordinates: Float[Tensor, "n r"]) -> Float[Tensor, "n r2"]:
    """Return the different entries of each x x^T: products of coordinates i <= j, ordered as `torch.triu_indices`."""
    r = coordinates.shape[1]
    first, second = torch.triu_indices(r, r, device=coordinates.device)
    pairs: Float[Tensor, "n r2"] = coordinates[:, first] * coordinates[:, second]
    return pairs


def upper_places(r: int, device: torch.device) -> Int[Tensor, " r2"]:
    """Return the indices of those entries in a flattened matrix of r x r."""
    first, second = torch.triu_indices(r, r, device=device)
    places: Int[Tensor, " r2"] = first * r + second
    return places


def pair_places(r: int, device: torch.device) -> Int[Tensor, "r r"]:
    """Return the index of the product of coordinates i and j among those of `pairs_of`."""
    first, second = torch.triu_indices(r, r, device=device)
    places = torch.zeros(r, r, dtype=torch.int64, device=device)
    places[first, second] = places[second, first] = torch.arange(len(first), device=device)
    return places


def assembled(sums: Float[Tensor, "r2 p2"], r: int, p: int) -> Float[Tensor, "pr pr"]:
    """Return the lower triangle of a matrix of products from its different entries.

    Args:
        sums: by pairs of the r coordinates and pairs of the p ones, as from `pairs_of`.
        r, p: numbers of coordinates.

    Returns:
        The matrix, in blocks of the larger number.
    """
    if r > p:
        return assembled(sums.T, p, r)
    matrix, places = sums.new_empty(r * p, r * p), pair_places(p, sums.device)
    blocks = matrix.view(r, p, r, p)
    for number, (i, j) in enumerate(torch.triu_indices(r, r).T.tolist()):
        blocks[j, :, i] = sums[number][places]
    return matrix
