"""Keeps the proxies at the data: sets them to what the layers really see, once or now and then during `fit`."""

import keras
import numpy as np

from keras_proxynorm.arguments import as_positive_integer
from keras_proxynorm.layers.proxy_normalization import ProxyNormalizationLayer
from keras_proxynorm.observation.calls import check_batch
from keras_proxynorm.observation.calls import visit_normalized_inputs

__all__ = ["CalibrateProxies", "calibrate_proxies"]


def calibrate_proxies(model: keras.Model, data) -> int:
    """Sets the proxies of all layers to mean and standard deviation of their normalized inputs over some data.

    Proxy normalization centers and scales what is as its proxy. A proxy that is far from the data leaves channels with
    a mean and a scale of their own, of which `keras_proxynorm.diagnostics.collapse_report` tells; the loss does not
    draw it back. This does. The model computes something else afterwards: do it before or during training, or train on.

    Args:
        model: A built model with `GroupNormProxy`, `LayerNormProxy` or `ProxyActivation` layers, wherever in it.
        data: A batch of inputs, as for a call of the model; some dozen samples do. The layers see what the layers
            before them make of it when their proxies are set.

    Returns:
        The number of layers whose proxies were set. Those of frozen layers are not.

    Raises:
        ValueError: If the model does not take the data, or has no proxies that can be set.

    Example:

    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.training import calibrate_proxies
    >>> model = keras.Sequential([
    ...     keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3), keras_proxynorm.LayerNormProxy(),
    ... ])
    >>> calibrate_proxies(model, np.random.normal(size=(32, 8, 8, 3)))
    1

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743), whose proxies are learned alone
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"Argument `model` must be a built keras.Model. Received: model={model!r}")
    layers = _layers_with_proxies(model)
    if not layers:
        raise ValueError(
            "Argument `model` must have layers with proxies that are not frozen. Received: model "
            f"'{model.name}', which has none"
        )
    visited = []

    def calibrate(layer, mean, stddev):
        layer.proxy.assign(np.stack([mean, stddev - 1]))
        visited.append(layer)

    with check_batch("data", model, data):
        visit_normalized_inputs(model, layers, data, calibrate)
    return len(visited)


def _layers_with_proxies(model):
    layers = {id(layer): layer for layer in model._flatten_layers() if isinstance(layer, ProxyNormalizationLayer)}
    return [layer for layer in layers.values() if layer.proxy is not None and layer.trainable]


class CalibrateProxies(keras.callbacks.Callback):
    """Sets the proxies to the data every so many steps of `fit`, as `calibrate_proxies` does.

    Between two of these the proxies are learned, and the model is a function of its weights and of single samples, as
    always. What it helps with is layer norm with large batches, so with large learning rates and few steps, in which
    proxies are left behind; docs/accuracy.md has measurements.

    Each time costs a forward pass over the data that is not compiled.

    Args:
        data: A batch of inputs, as for a call of the model: some dozen samples of the training data.
        every: Positive integer: after how many steps. With `steps_per_execution`, after the first execution that
            completes so many. Defaults to 8, which was enough where 32 was not.

    Raises:
        ValueError: If `every` is not a positive integer. From `fit`: as `calibrate_proxies`.

    Example:

    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.training import CalibrateProxies
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3)])
    >>> model.add(keras_proxynorm.LayerNormProxy(name="norm"))
    >>> model.add(keras.layers.GlobalAveragePooling2D())
    >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> images, labels = np.random.normal(size=(64, 8, 8, 3)), np.random.randint(16, size=64)
    >>> history = model.fit(images, labels, callbacks=[CalibrateProxies(images[:32], every=1)], verbose=0)
    """

    def __init__(self, data, every: int = 8):
        super().__init__()
        self.data = data
        self.every = as_positive_integer("every", every)

    def on_train_begin(self, logs=None):
        self._steps, self._calibrated = 0, 0

    def on_epoch_begin(self, epoch, logs=None):
        self._first = self._steps

    def on_train_batch_end(self, batch, logs=None):
        self._steps = self._first + batch + 1
        if self._steps // self.every > self._calibrated // self.every:
            self._calibrated = self._steps
            if keras.backend.backend() == "jax":
                # The weights are where `fit` has them, not in the model, and are fetched from there again afterwards.
                self.model.jax_state_sync()
            calibrate_proxies(self.model, self.data)
