"""Sparse matrices that are exactly orthogonal, made of random Givens rotations. NumPy and SciPy, no Keras.

A rotation of two rows gives both the union of their supports, and keeps all products of columns: a matrix that begins
with one entry in each column fills up rotation by rotation, and stays orthogonal.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Construction = Literal["rotations", "matchings"]
CONSTRUCTIONS = get_args(Construction)


def sparse_orthogonal(
    rows: int, columns: int, nonzeros: int, construction: Construction, random: np.random.Generator
) -> np.ndarray:
    """A random matrix W of orthonormal columns (of rows, when there are fewer rows) with a number of nonzeros.

    rotations: of two random rows at a time, by a random angle, as in Nowak et al. 2024. Rows that were chosen often
    have many nonzeros: the lengths of supports are spread widely. matchings: all rows in random pairs, round after
    round, each of which doubles the supports: they are about equally long. Of the last round as many pairs as it takes.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        nonzeros: How many entries are to be nonzero: from max(rows, columns) to rows * columns. What is met is
            within half of what one rotation adds.
        construction: "rotations" or "matchings".
        random: Where random numbers come from.

    Returns:
        A float64 array of shape (rows, columns).

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.orthogonal import sparse_orthogonal
        >>> w = sparse_orthogonal(100, 60, 600, "rotations", np.random.default_rng(0))
        >>> bool(np.allclose(w.T @ w, np.eye(60), atol=1e-14)), bool(abs(np.count_nonzero(w) - 600) < 60)
        (True, True)

    Reference:
        Nowak et al. 2024, Sparser, Better, Deeper, Stronger: Improving Sparse Training with Exact Orthogonal
        Initialization, arXiv:2406.01755, section 3.
    """
    if rows < columns:
        return sparse_orthogonal(columns, rows, nonzeros, construction, random).T
    return (_by_rotations if construction == "rotations" else _by_matchings)(rows, columns, nonzeros, random)


def expected_density(rows: int, rotations: int) -> float:
    """The mean density of a square or tall matrix after a number of random rotations.

    The support of a column begins with 1 row, and grows from k to k + 1 when a rotation takes one row of it and one
    that is not: with probability 2 k (m - k) / (m (m - 1)), m the number of rows.

    Args:
        rows: m, at least 2.
        rotations: How many rotations, at least 0.

    Example:
        >>> from keras_sparse_init.orthogonal import expected_density
        >>> expected_density(4, 0), round(expected_density(4, 1), 4)
        (0.25, 0.375)

    Reference:
        Nowak et al. 2024, arXiv:2406.01755, section 3.2.
    """
    k = np.arange(rows + 1)
    grows = 2 * k * (rows - k) / (rows * (rows - 1))
    step = np.diag(1 - grows) + np.diag(grows[:-1], 1)
    return float((np.linalg.matrix_power(step, rotations)[1] @ k) / rows)


def _start(rows: int, columns: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """For each column its only row, and the 1 or -1 there: which of a rotated row come first is left to chance."""
    return random.permutation(rows)[:columns], random.choice([-1.0, 1.0], columns)


def _by_rotations(rows: int, columns: int, nonzeros: int, random: np.random.Generator) -> np.ndarray:
    places, signs = _start(rows, columns, random)
    matrix = np.zeros((rows, columns))
    matrix[places, np.arange(columns)] = signs
    support = matrix != 0
    counts, total = support.sum(axis=1), columns
    while total < nonzeros:
        first, second = int(random.integers(rows)), int(random.integers(rows - 1))
        second += second >= first
        union = support[first] | support[second]
        size = int(np.count_nonzero(union))
        grown = total + 2 * size - int(counts[first] + counts[second])
        if grown - nonzeros > nonzeros - total:
            break
        angle = random.uniform(0, 2 * np.pi)
        cos, sin = np.cos(angle), np.sin(angle)
        pair = matrix[[first, second]]
        matrix[first], matrix[second] = cos * pair[0] - sin * pair[1], sin * pair[0] + cos * pair[1]
        support[first] = support[second] = union
        counts[first] = counts[second] = size
        total = grown
    return matrix


def _by_matchings(rows: int, columns: int, nonzeros: int, random: np.random.Generator) -> np.ndarray:
    from scipy import sparse

    places, signs = _start(rows, columns, random)
    matrix = sparse.csr_array((signs, (places, np.arange(columns))), (rows, columns))
    while matrix.nnz < nonzeros:
        pairs = random.permutation(rows)[: rows // 2 * 2].reshape(-1, 2)
        angles = random.uniform(0, 2 * np.pi, len(pairs))
        pattern = matrix.copy()
        pattern.data = np.ones_like(matrix.data)
        chosen = sparse.csr_array(
            (np.ones(pairs.size), (np.repeat(np.arange(len(pairs)), 2), pairs.ravel())), (len(pairs), rows)
        )
        unions = np.diff((chosen @ pattern).indptr)
        counts = np.diff(matrix.indptr)
        grown = matrix.nnz + np.cumsum(2 * unions - counts[pairs].sum(axis=1))
        taken = len(pairs)
        if grown[-1] > nonzeros:
            over = int(np.searchsorted(grown, nonzeros))
            before = grown[over - 1] if over else matrix.nnz
            taken = over + int(grown[over] - nonzeros <= nonzeros - before)
        first, second = pairs[:taken].T
        cos, sin = np.cos(angles[:taken]), np.sin(angles[:taken])
        rest = np.setdiff1d(np.arange(rows), pairs[:taken])
        rotation = sparse.csr_array(
            (
                np.concatenate([cos, -sin, sin, cos, np.ones(len(rest))]),
                (
                    np.concatenate([first, first, second, second, rest]),
                    np.concatenate([first, second, first, second, rest]),
                ),
            ),
            (rows, rows),
        )
        matrix = rotation @ matrix
        if taken < len(pairs):
            break
    return matrix.toarray()
