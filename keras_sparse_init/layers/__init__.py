"""Layers around layers, one source for both Kerases."""

from keras_sparse_init.layers.masked import Masked
from keras_sparse_init.layers.weight_norm import WeightNorm

__all__ = ["Masked", "WeightNorm"]
