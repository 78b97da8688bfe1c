"""`Masked` in both Kerases: what it computes, its gradients, masks, building and training. Saving has its own file."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from masked_layers import CASES, arguments, masked_case

either_keras = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


def outputs_and_gradients(layer, args, kwargs):
    variables = [weight if isinstance(weight, tf.Variable) else weight.value for weight in layer.trainable_weights]
    with tf.GradientTape() as tape:
        outputs = tf.nest.flatten(layer(*args, **kwargs))
        loss = sum(tf.reduce_sum(tf.sin(output)) for output in outputs)
    gradients = tape.gradient(loss, variables)
    return outputs, [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]


# What it computes.


@either_keras
@pytest.mark.parametrize("name", CASES)
def test_a_masked_layer_is_the_layer_on_kernel_times_mask(library, name):
    masked, plain, masks = masked_case(library, name)
    args, kwargs = arguments(library, name)
    outputs, gradients = outputs_and_gradients(masked, args, kwargs)
    expected_outputs, expected_gradients = outputs_and_gradients(plain, args, kwargs)
    for output, expected in zip(outputs, expected_outputs, strict=True):
        np.testing.assert_array_equal(output, expected)
    for gradient, expected, mask in zip(gradients, expected_gradients, masks, strict=True):
        if mask is not None:
            assert not gradient[mask == 0].any()
            expected = expected * mask
        assert gradient.any()
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
