"""Layers around layers, one source for both Kerases."""

from keras_sparse_init.layers.masked import Masked

__all__ = ["Masked"]
