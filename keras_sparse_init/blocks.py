"""Work in fixed blocks: large kernels are drawn block by block, on two threads, with one random stream a block.

The blocks depend on the shape alone, so values do not depend on how many threads there are.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

BLOCK_SIZE = 2**20

Result = TypeVar("Result")

_local = threading.local()


def row_blocks(rows: int, width: int) -> list[slice]:
    """Slices of whole rows that hold about `BLOCK_SIZE` elements each."""
    height = max(1, BLOCK_SIZE // width)
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def map_blocks(function: Callable[..., Result], *items: Iterable[Any]) -> list[Result]:
    """`[function(*args) for args in zip(*items)]` on two threads; NumPy releases the lock in its loops.

    Called by the function itself, on one of the threads, it takes no others: large work is shared out once.
    """
    work = list(zip(*items, strict=True))
    if len(work) < 2 or getattr(_local, "is_worker", False):
        return [function(*args) for args in work]
    return list(_pool().map(lambda args: function(*args), work))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="keras_sparse_init", initializer=_mark_worker)


def _mark_worker() -> None:
    _local.is_worker = True


# Threads do not survive a fork; the child makes its own.
os.register_at_fork(after_in_child=_pool.cache_clear)
