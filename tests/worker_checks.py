"""One worker of `MultiWorkerMirroredStrategy`: builds and trains sparse models, prints what it has as JSON."""

import hashlib
import json
import os
import warnings

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
import tf_keras

from keras_sparse_init import Masked, SparseHeNormal, masked_kernels, masks, reinitialize, set_masks, sparsify

layers = tf_keras.layers


def digest(model) -> str:
    arrays = [np.asarray(v) for kernel in masked_kernels(model) for v in (kernel.kernel, kernel.mask)]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def network(wrapper: str, seed: int | None):
    dense = tf_keras.Sequential([layers.Input((6,)), layers.Dense(8, "relu"), layers.Dense(2)])
    return sparsify(dense, 0.5, wrapper=wrapper, seed=seed)


def layerwise(seed: int | None):
    return tf_keras.Sequential(
        [
            layers.Input((6,)),
            Masked(layers.Dense(8), sparsity=0.5, seed=seed),
            Masked(layers.Dense(2, kernel_initializer=SparseHeNormal(sparsity=0.5, seed=seed))),
        ]
    )


def main() -> None:
    warnings.filterwarnings("ignore")
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    x, y = np.random.default_rng(0).normal(size=(16, 6)), np.zeros((16, 2))
    result = {"workers": strategy.num_replicas_in_sync}
    for seed in (None, 3):
        for name in ("tfmot", "masked", "layerwise"):
            with strategy.scope():
                model = layerwise(seed) if name == "layerwise" else network(name, seed)
                model.compile(tf_keras.optimizers.SGD(0.1, momentum=0.9), "mse")
            result[f"{name}, seed {seed}, new"] = digest(model)
            if seed is None:
                model.fit(x, y, batch_size=8, epochs=1, verbose=0)
                result[f"{name}, seed {seed}, trained"] = digest(model)
            with strategy.scope():
                set_masks(model, masks.Random(0.75), seed=seed)
                reinitialize(model, seed=seed)
            result[f"{name}, seed {seed}, anew"] = digest(model)
    print("RESULT" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
