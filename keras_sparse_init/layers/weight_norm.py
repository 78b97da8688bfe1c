"""`WeightNorm`: a layer that runs on w = g v / ||v||, for both Kerases and every backend of Keras 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_sparse_init import compat, tfmot_wrapper, traversal
from keras_sparse_init.arguments import check_positive, is_integer
from keras_sparse_init.layers.normalization import norm, normalized
from keras_sparse_init.layers.regularization import regularize_effective, release_regularizers
from keras_sparse_init.layers.wrapper import KernelWrapper, Slot, classes_for_both, layout_of
from keras_sparse_init.traversal import KernelPlace, MaskWrapper


@dataclasses.dataclass(frozen=True, eq=False)
class _Slot(Slot):
    """The place of a v; its partner is g, or None. `axes` index the units, all other axes are summed over."""

    axes: tuple[int, ...] = ()


class WeightNorm(KernelWrapper):
    """Wraps a layer so that it runs on w = g v / ||v||: the length and the direction of weights are trained apart.

    v is the layer's own kernel variable, g a new trainable weight with a number for each unit; ||v|| is the norm over
    all weights of a unit. g starts as ||v||, so that wrapping a layer, built or not, changes no output. The gradients:

        dg = <dw, v> / ||v||,    dv = g / ||v|| dw - g dg / ||v||^2 v

    dv is orthogonal to v. Norms are computed in float32 at least, and do not depend on the scale of v. A unit whose
    weights are all 0 has w = 0 and no gradient. Biases are left alone. All kernels of the layer and of the layers
    inside it are normalized: `kernel`, `recurrent_kernel`, `depthwise_kernel`, `pointwise_kernel`, `embeddings`.

    A unit is what has an output of its own: a column of a Dense kernel, a filter, a gate's unit of a recurrent kernel,
    a row of an Embedding. The axes follow from the layer.

    A regularizer of the wrapped layer's kernel acts on w. With masks, w = g (m v) / ||m v||: in
    `Masked(WeightNorm(layer))`, `WeightNorm(Masked(layer))` and tfmot's `prune_low_magnitude(WeightNorm(layer))`.
    Changing masks keeps g; drawing v anew, as `reinitialize` does, makes g the new ||m v||: w is what was drawn.

    A layer that is frozen when it is wrapped stays frozen, and g with it; of one that is frozen in part every g is
    trained. Afterwards freeze the wrapper: `trainable` of the layer inside says nothing of g.

    `WeightNorm(layer)` is an instance of a subclass for the Keras of the layer: it is a `keras.layers.Layer` around
    a `keras` layer, a `tf_keras.layers.Layer` around a `tf_keras` layer.

    Args:
        layer: A layer of either Keras, built or not.
        weight_names: Attribute names of the weights to normalize, when not all kernels are meant or a layer of your
            own calls them otherwise.
        feature_axes: The axis or axes of the kernels that index units, when not those that the layer says: g has
            their shape. An empty list gives one norm for a whole kernel.
        use_scale: False for w = v / ||v||, without g.
        init_scale: A positive float: the standard deviation that data-dependent initialization gives to units.
        **kwargs: `name`, `dtype`, `trainable` as in every Keras layer. `dtype` is the wrapped layer's by default.

    Raises:
        TypeError: When `layer` is no Keras layer.
        ValueError: When the layer is normalized or pruned by tfmot already; at build, when it has no kernel, a name
            is unknown, the axes do not fit, a kernel has a constraint (it would act on v, not on w), or LoRA is
            enabled on the layer (its kernel is not the one it uses).

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import WeightNorm
        >>> layer = WeightNorm(keras.layers.Dense(3, kernel_initializer="ones"))
        >>> model = keras.Sequential([keras.layers.Input((16,)), layer])
        >>> np.asarray(layer.kernel_g).tolist()
        [4.0, 4.0, 4.0]
        >>> layer.kernel_g.assign([1.0, 2.0, 4.0])  # doctest: +ELLIPSIS
        <...
        >>> model.predict(np.ones((1, 16)), verbose=0).tolist()
        [[4.0, 8.0, 16.0]]

    Reference:
        Salimans and Kingma 2016, Weight normalization, arXiv:1602.07868, equations (2) and (3).
    """

    _done = "normalized"
    _undone = "fold"

    def __init__(
        self,
        layer: Any,
        weight_names: Sequence[str] | None = None,
        feature_axes: int | Sequence[int] | None = None,
        use_scale: bool = True,
        init_scale: float = 1.0,
        **kwargs: Any,
    ):
        for part in layer._flatten_layers():
            if isinstance(part, WeightNorm):
                raise ValueError(f"`layer` is normalized already: {part.name!r}")
            if tfmot_wrapper.is_wrapper(part):
                raise ValueError(
                    f"{part.name!r} would mask v after w has been computed. Put the wrappers the other way round: "
                    "`prune_low_magnitude(WeightNorm(layer))`"
                )
        kwargs.setdefault("name", f"weight_norm_{layer.name}")
        kwargs.setdefault("trainable", not _is_frozen(layer))
        super().__init__(layer, weight_names, **kwargs)
        self.feature_axes = _check_axes(feature_axes)
        if not isinstance(use_scale, bool):
            raise ValueError(f"`use_scale` must be a bool. Received: use_scale={use_scale!r}")
        self.use_scale = use_scale
        self.init_scale = check_positive("init_scale", init_scale)

    def effective_weights(self) -> list[Any]:
        """The w of each normalized kernel, as a tensor, in the order of the layer's kernels.

        Raises:
            ValueError: When the layer is not built.
        """
        compat.require_built(self, "weights")
        return [self._effective(slot, slot.kernel) for slot in self._slots]

    def get_prunable_weights(self) -> list[Any]:
        """The variable v of each normalized kernel: what tfmot prunes."""
        compat.require_built(self, "weights")
        return [slot.kernel for slot in self._slots]

    def canonicalize(self) -> None:
        """Makes v := w and g := |g|, which changes no output.

        What looks at v then sees w: pruning by magnitude, say. Later gradients are those of the new lengths, and what
        an optimizer remembers of v is not rescaled. A unit with g = 0 gets v = 0, from which it cannot come back.
        """
        for slot, w in zip(self._slots, self.effective_weights(), strict=True):
            compat.assign(slot.kernel, compat.to_numpy("w", w))
            if slot.partner is not None:
                compat.assign(slot.partner, np.abs(compat.to_numpy("g", slot.partner)))

    def fold(self) -> Any:
        """A plain layer with the same output: of the wrapped layer's name and config, built, with w for v.

        Raises:
            ValueError: When the layer is not built.
        """
        values = self.folded_values()
        plain = type(self.layer).from_config(self.layer.get_config())
        if self._built_with is not None:
            self._build_like_layer(plain, self._built_with)
        elif hasattr(plain, "_build_from_signature"):
            # The attention of tf_keras, whose config has all shapes.
            compat.build_layer(plain, None, {})
        elif not plain.built:
            plain.build_from_config(self.layer.get_build_config())
        traversal.copy_state(self.layer, plain)
        put_folded_values(plain, values)
        return plain

    def folded_values(self) -> list[np.ndarray | None]:
        """For each variable of the wrapped layer the w to put there, or None."""
        found = {
            id(slot.kernel): compat.to_numpy("w", w)
            for slot, w in zip(self._slots, self.effective_weights(), strict=True)
        }
        return [found.get(id(variable)) for variable in traversal.variables(self.layer)]

    def _build_slots(self, places: list[KernelPlace], fresh: bool) -> None:
        for place in places:
            if getattr(place.kernel, "constraint", None) is not None:
                raise ValueError(
                    f"The layer {place.owner.name!r} has a constraint on {place.name!r}, which would act on v and not "
                    "on w = g v / ||v||. Make the layer without it: the norms of w are g"
                )
        for place in places:
            axes = self._axes_of(place)
            slot = _Slot(place.name, place.owner, place.attribute, place.kernel, self._holders(place.kernel), axes=axes)
            if self.use_scale:
                slot = dataclasses.replace(slot, partner=self._add_scale(slot))
            self._slots.append(slot)
            regularize_effective(self, slot)

    def _axes_of(self, place: KernelPlace) -> tuple[int, ...]:
        rank = len(place.shape)
        if self.feature_axes is None:
            layout = layout_of(place)
            # One token is one row: what an embedding puts out is all of its weights.
            return (0,) if layout.one_hot else layout.output_axes
        axes = tuple(sorted({axis % rank for axis in self.feature_axes if -rank <= axis < rank}))
        if len(axes) < len(self.feature_axes) or len(axes) == rank:
            raise ValueError(
                f"`feature_axes` must be different axes of {place.name!r}, of shape {place.shape}, but not all. "
                f"Received: feature_axes={self.feature_axes}"
            )
        return axes

    def _add_scale(self, slot: _Slot) -> Any:
        name, shape = f"{slot.name.replace('/', '_')}_g", tuple(slot.kernel.shape[axis] for axis in slot.axes)
        scale = self.add_weight(
            name=name, shape=shape, initializer=self._first_scale(slot), dtype=compat.true_dtype(slot.kernel)
        )
        # Checkpoints of Keras 3 find a weight by the attribute that holds it.
        setattr(self, name, scale)
        return scale

    def _first_scale(self, slot: _Slot) -> Callable[..., Any]:
        def initial(shape: Any, dtype: Any = None) -> Any:
            v = self._masked_inside(slot, compat.own_value(slot.kernel))
            ops = compat.ops_of(v)
            return ops.cast(ops.reshape(norm(v, slot.axes), tuple(shape)), dtype)

        return initial

    def after_drawing(self, kernels: list[Any]) -> None:
        """Makes g the norm of a v that has been drawn anew, so that w is what was drawn."""
        drawn = {id(getattr(kernel, "_variable", kernel)) for kernel in kernels}
        for slot in self._slots:
            if slot.partner is not None and id(getattr(slot.kernel, "_variable", slot.kernel)) in drawn:
                compat.initialize(slot.partner, self._first_scale(slot))

    def _effective(self, slot: _Slot, kernel: Any) -> Any:
        v = self._masked_inside(slot, compat.own_value(kernel))
        g = None if slot.partner is None else compat.own_value(slot.partner)
        return compat.ops_of(v).cast(normalized(v, g, slot.axes), v.dtype)

    def _masked_inside(self, slot: _Slot, v: Any) -> Any:
        """The kernel on the mask of a `Masked` inside: weights off it are not to count."""
        for part in self.layer._flatten_layers():
            if isinstance(part, MaskWrapper):
                for kernel, mask in part.kernels_and_masks():
                    v = v * compat.own_value(mask) if kernel is slot.kernel else v
        return v

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        config = super().get_config()
        config.update(
            weight_names=self.weight_names,
            feature_axes=None if self.feature_axes is None else list(self.feature_axes),
            use_scale=self.use_scale,
            init_scale=self.init_scale,
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> WeightNorm:
        """A new layer from what `get_config` returned."""
        config = dict(config)
        return cls(cls.layer_from_config(config.pop("layer"), custom_objects), **config)


def put_folded_values(plain: Any, values: list[np.ndarray | None]) -> None:
    """Gives a copy of a wrapped layer, or the layer itself, the w that `folded_values` returned."""
    release_regularizers(plain)
    for variable, value in zip(traversal.variables(plain), values, strict=True):
        if value is not None:
            compat.assign(variable, value)


def _is_frozen(layer: Any) -> bool:
    """Whether a layer is frozen, or what is inside it is when it is a wrapper or a loop over a cell."""
    layers, inside = compat.library_of(layer).layers, []
    if isinstance(layer, layers.Wrapper | layers.Bidirectional | layers.RNN):
        inside = list(layer._flatten_layers(recursive=False, include_self=False))
    return not layer.trainable or (bool(inside) and all(map(_is_frozen, inside)))


def _check_axes(axes: Any) -> tuple[int, ...] | None:
    if axes is None:
        return None
    axes = (axes,) if is_integer(axes) else axes
    if not isinstance(axes, list | tuple) or not all(map(is_integer, axes)):
        raise ValueError(f"`feature_axes` must be an int, a list of ints or None. Received: feature_axes={axes!r}")
    return tuple(int(axis) for axis in axes)


CLASSES = classes_for_both(WeightNorm)
