"""Work in fixed blocks: large kernels are drawn block by block, on two threads, with one random stream a block.

The blocks depend on the shape alone, so values do not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

BLOCK_SIZE = 2**20
_THREADS = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


def row_blocks(rows: int, width: int) -> list[slice]:
    """Slices of whole rows that hold about `BLOCK_SIZE` elements each."""
    height = max(1, BLOCK_SIZE // width)
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def map_blocks(function: Callable[..., Result], *items: Iterable[Item]) -> list[Result]:
    """`[function(*args) for args in zip(*items)]` on two threads; NumPy releases the lock in its loops."""
    work = list(zip(*items, strict=True))
    if len(work) < 2:
        return [function(*args) for args in work]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda args: function(*args), work))
