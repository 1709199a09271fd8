"""The models, data and training that the tests compare between one worker and several."""

import keras
import numpy as np
from backends import numpy

import keras_proxynorm as kp

BATCH_SIZE = 8
EPOCHS = 2

NORMALIZATIONS = {
    "group_norm_proxy": lambda: [kp.GroupNormProxy(4)],
    "layer_norm_proxy": lambda: [kp.LayerNormProxy()],
    "batch_norm": lambda: [keras.layers.BatchNormalization(), keras.layers.ReLU()],
}
PROXY_NORM = ["group_norm_proxy", "layer_norm_proxy"]
BATCH_NORM = ["batch_norm", "batch_norm"]


def data():
    """Four batches of images that differ in mean and scale, so that it shows which of them a statistic is of."""
    random = np.random.default_rng(0)
    count = 4 * BATCH_SIZE
    labels = random.integers(0, 2, count)
    images = random.standard_normal((count, 10, 10, 3)) + labels[:, None, None, None] * [1, 0, -1]
    images = images * random.uniform(0.5, 2, (count, 1, 1, 1)) + random.standard_normal((count, 1, 1, 1))
    return images.astype("float32"), labels


def model(normalizations):
    """Builds and compiles convolutions, each followed by a normalization, with the same weights each time.

    Momentum and not Adam: where a gradient is small, the step of Adam is the sign of it, which rounding can change.
    """
    keras.utils.set_random_seed(0)
    layers = [keras.Input((10, 10, 3))]
    for name in normalizations:
        layers += [keras.layers.Conv2D(8, 3, use_bias=False), *NORMALIZATIONS[name]()]
    model = keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
    return model


def fit(model, images, labels, batch_size, callbacks=()):
    """Returns the weights before and after training, and the loss of each epoch, by name."""
    before = {f"before/{index} {weight.name}": numpy(weight) for index, weight in enumerate(model.weights)}
    # In order: the workers' shares are to make up the batches that one worker sees.
    history = model.fit(
        images, labels, batch_size=batch_size, epochs=EPOCHS, shuffle=False, callbacks=list(callbacks), verbose=0
    ).history
    after = {f"after/{index} {weight.name}": numpy(weight) for index, weight in enumerate(model.weights)}
    return {**before, **after, "loss": np.array(history["loss"])}
