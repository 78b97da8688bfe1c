"""Kernels brought near an isometry under masks that are given. NumPy and SciPy, no Keras."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from keras_sparse_init import fans
from keras_sparse_init.arguments import check_all_finite, check_positive, is_integer

# A step that lowers the squared residual, or 1 if that is more, by less than this part of it is the last.
_LEAST_DECREASE = 1e-6
_SECONDS_BETWEEN_LINES = 1.0


def approximate_isometry(
    kernel: Any,
    mask: Any = None,
    steps: int = 100,
    gain: float = 1.0,
    *,
    kernel_layout: Any = None,
    verbose: int = 0,
) -> np.ndarray:
    """Moves the weights that a mask leaves so that the masked kernel becomes as nearly orthogonal as it can.

    min over w of || (c*w)^T (c*w) - gain^2 I ||_F, c the mask and w the kernel as a matrix (inputs, units), the
    receptive field among the inputs; with fewer inputs than units, of || (c*w) (c*w)^T - gain^2 I ||_F. Each group of a
    convolution, each channel of a depthwise one and each gate of a recurrent kernel is a matrix by itself. A unit (an
    input, with fewer inputs) without weights adds gain^2 to the residual whatever the others are.

    Each matrix is scaled first, as suits it best. A step is one of SciPy's L-BFGS-B, which never raises the residual: a
    hundred come about as far as several thousand of plain gradient descent, the paper's way. The last is that which
    lowers the square of the residual by less than a millionth (of itself, as long as it is above gain^4). The start
    counts: the paper's is an orthogonal kernel, masked, as `ApproximateIsometryInit` draws it.

    Args:
        kernel: Array of the kernel's shape, finite. No unit (no input, with fewer inputs) may be 0 in all the places
            that the mask leaves it. It is left alone.
        mask: Array of 0 and 1 of that shape; None: the places where the kernel is not 0.
        steps: Largest number of steps, at least 0.
        gain: Positive float, what every singular value is to be.
        kernel_layout: How to read the kernel's axes: as in `kernel_layout`, a name, an equation or a layer. None
            follows Keras: (inputs, units), (receptive field..., inputs, units).
        verbose: 1 prints the residual about once a second, for long runs; 0 nothing.

    Returns:
        An array of the kernel's shape and dtype, 0 off the mask.

    Raises:
        ValueError: When an argument is not one of those allowed, the mask does not fit, or the kernel is one of an
            embedding.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init import approximate_isometry, masks
        >>> mask = masks.random_mask((100, 60), 0.9, seed=0)
        >>> w = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 60)))[0] * mask
        >>> v = approximate_isometry(w, mask)
        >>> for kernel in (w, v):
        ...     print(f"{np.linalg.norm(kernel.T @ kernel - np.eye(60)):.1f}")
        7.0
        0.0

    Reference:
        Lee et al. 2020, A Signal Propagation Perspective for Pruning Neural Networks at Initialization,
        arXiv:1906.06307, section 4, eq. (7).
    """
    values = np.asarray(kernel)
    if values.dtype.kind not in "biuf" and values.dtype.name != "bfloat16":
        raise ValueError(f"`kernel` must be an array of real numbers. Received: one of {values.dtype}")
    shape = fans.check_shape(values.shape)
    active = values != 0 if mask is None else fans.as_mask(mask, shape)
    if not is_integer(steps) or steps < 0:
        raise ValueError(f"`steps` must be an int of at least 0. Received: steps={steps!r}")
    if verbose not in (0, 1):
        raise ValueError(f"`verbose` must be 0 or 1. Received: verbose={verbose!r}")
    gain = check_positive("gain", gain)
    start = np.where(active, values, 0).astype(np.float64) / gain
    check_all_finite("`kernel`", start)
    places = matrices(np.arange(values.size).reshape(shape), kernel_layout)
    starts, on = start.reshape(-1)[places], active.reshape(-1)[places]
    if stuck := int((on.any(axis=1) & ~starts.any(axis=1)).sum()):
        raise ValueError(
            "`kernel` must not be 0 in all places that the mask leaves a unit (an input, with fewer inputs): no step "
            f"leads away from there. Received: {stuck} such"
        )
    found = np.empty(values.size)
    found[places] = _descend(starts, on, int(steps), bool(verbose)) * gain
    dtype = np.float64 if values.dtype.kind in "biu" else values.dtype
    return found.reshape(shape).astype(dtype)


def matrices(values: np.ndarray, kernel_layout: Any = None) -> np.ndarray:
    """A kernel as matrices with at least as many rows as columns: an array of shape (matrices, rows, columns).

    Rows are inputs, with the receptive field, and columns units, or the other way round where there are fewer inputs.

    Args:
        values: An array of the kernel's shape.
        kernel_layout: As in `approximate_isometry`.

    Raises:
        ValueError: When the layout does not fit, or is an embedding's.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.isometry import matrices
        >>> matrices(np.ones((3, 3, 16, 32))).shape, matrices(np.ones((3, 3, 16, 2)), "depthwise").shape
        ((1, 144, 32), (16, 9, 2))
    """
    layout = fans.kernel_layout(kernel_layout, values.shape)
    if layout.one_hot:
        raise ValueError(f"`kernel` must be one that sums over inputs. Received: the layout {layout.name!r}")
    rows = [axis for axis in range(layout.rank) if axis in layout.fan_in_axes]
    alone = [axis for axis in range(layout.rank) if axis not in layout.fan_in_axes + layout.fan_out_axes]
    columns = [axis for axis in range(layout.rank) if axis not in rows + alone]
    moved = values.transpose(alone + rows + columns)
    sizes = [int(np.prod([values.shape[axis] for axis in axes])) for axes in (alone, rows, columns)]
    if layout.blocks > 1:
        # Of the last axis, which is the only one of units then.
        moved = moved.reshape(sizes[0], sizes[1], layout.blocks, -1).swapaxes(1, 2)
        sizes = [sizes[0] * layout.blocks, sizes[1], sizes[2] // layout.blocks]
    moved = moved.reshape(sizes)
    return moved if sizes[1] >= sizes[2] else moved.swapaxes(1, 2)


def _descend(start: np.ndarray, active: np.ndarray, steps: int, verbose: bool) -> np.ndarray:
    from scipy.optimize import minimize  # Not needed to load a model.

    places = np.flatnonzero(active)
    if not places.size or not steps:
        return start
    current, units = np.zeros(start.shape), np.arange(start.shape[2])

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        current.reshape(-1)[places] = weights
        products = current.swapaxes(1, 2) @ current
        products[:, units, units] -= 1.0
        return float(np.vdot(products, products)), 4.0 * (current @ products).reshape(-1)[places]

    told, step = time.monotonic(), 0

    def tell(intermediate_result: Any) -> None:
        nonlocal told, step
        step += 1
        if verbose and time.monotonic() - told >= _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            print(f"isometry: step {step} of at most {steps}, residual {intermediate_result.fun**0.5:.4g}", flush=True)

    # A step may try several lengths: `maxfun` would count each.
    options = {"maxiter": steps, "maxfun": 20 * steps, "ftol": _LEAST_DECREASE, "gtol": 0.0}
    result = minimize(
        objective, _scaled(start).reshape(-1)[places], jac=True, method="L-BFGS-B", callback=tell, options=options
    )
    current.reshape(-1)[places] = result.x
    return current


def _scaled(matrices: np.ndarray) -> np.ndarray:
    """Each matrix M times the s that makes || s^2 M^T M - I || the smallest: s^2 = tr(M^T M) / || M^T M ||^2."""
    largest = np.abs(matrices).max(axis=(1, 2), keepdims=True)
    matrices = matrices / np.where(largest > 0, largest, 1.0)
    products = matrices.swapaxes(1, 2) @ matrices
    trace, square = np.trace(products, axis1=1, axis2=2), np.square(products).sum(axis=(1, 2))
    return matrices * np.sqrt(trace / np.where(square > 0, square, 1.0))[:, None, None]
