"""The optimizers of the training job: cosine decay, weight decay of the kernels, clipped gradients."""

from __future__ import annotations

from typing import Any

OPTIMIZERS = ("momentum", "sgd", "adam", "rmsprop")


def make_optimizer(
    name: str,
    learning_rate: float,
    steps: int,
    variables: list[Any],
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> Any:
    """A built optimizer, of the Keras of the variables, whose learning rate falls to 0 along a half cosine.

    Args:
        name: One of `OPTIMIZERS`; "momentum" is stochastic gradient descent with momentum, "sgd" that without.
        learning_rate: The first learning rate.
        steps: The number of steps after which it is 0.
        variables: The variables that will be trained.
        momentum: The momentum of "momentum" and "rmsprop".
        weight_decay: Each step also takes learning rate * weight_decay * kernel from each kernel (decoupled,
            Loshchilov & Hutter 2019, arXiv:1711.05101); biases and other vectors do not decay.
        clip_norm: Gradients are scaled down to this norm over all variables when theirs is larger. None: never.

    Returns:
        The optimizer.
    """
    from keras_sparse_init import compat

    keras = compat.library_of_variable(variables[0])
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    # 0 would still decay nothing, at the price of a pass over all kernels.
    common = {"weight_decay": weight_decay or None, "global_clipnorm": clip_norm}
    if name == "adam":
        optimizer = keras.optimizers.Adam(schedule, **common)
    elif name == "rmsprop":
        optimizer = keras.optimizers.RMSprop(schedule, momentum=momentum, **common)
    else:
        optimizer = keras.optimizers.SGD(schedule, momentum=momentum if name == "momentum" else 0.0, **common)
    if weight_decay:
        optimizer.exclude_from_weight_decay(var_list=[v for v in variables if len(v.shape) < 2])
    optimizer.build(variables)
    return optimizer
