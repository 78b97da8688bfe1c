"""Masks as short strings, for the configs of layers: one bit a weight, compressed."""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np


def pack(mask: np.ndarray) -> dict[str, Any]:
    """A boolean array as a JSON-serializable dict.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.packing import pack, unpack
        >>> unpack(pack(np.eye(2, dtype=bool))).tolist()
        [[True, False], [False, True]]
    """
    bits = zlib.compress(np.packbits(mask).tobytes())
    return {"shape": list(mask.shape), "bits": base64.b64encode(bits).decode("ascii")}


def unpack(config: dict[str, Any]) -> np.ndarray:
    """The boolean array of a dict that `pack` returned."""
    bits = np.frombuffer(zlib.decompress(base64.b64decode(config["bits"])), np.uint8)
    shape = tuple(config["shape"])
    return np.unpackbits(bits, count=math.prod(shape)).astype(np.bool_).reshape(shape)
