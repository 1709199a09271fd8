"""Sets the proxies to the moments that the layers see in data, once or regularly during `fit`."""

from typing import Any

import keras
import numpy as np

from keras_proxynorm.arguments import argument_error, as_positive_integer, check_built_model
from keras_proxynorm.compat import layers_inside
from keras_proxynorm.layers.proxy_normalization import ProxyNormalizationLayer
from keras_proxynorm.observation.calls import check_batch, visit_normalized_inputs

__all__ = ["CalibrateProxies", "calibrate_proxies"]


def calibrate_proxies(model: keras.Model, data: Any) -> int:
    """Sets the proxies of all layers to mean and standard deviation of their normalized inputs over a batch.

    Proxy normalization centers and scales channels that resemble their proxy. With a proxy that is far from the data,
    channels keep a mean and a scale of their own, which `keras_proxynorm.diagnostics.collapse_report` reports, and the
    loss does not pull the proxy back. This function does. It changes what the model computes: call it before or during
    training, or train on afterwards.

    Args:
        model: A built model with `GroupNormProxy`, `LayerNormProxy` or `ProxyActivation` layers at any depth.
        data: A batch of inputs, as for a call of the model; some dozen samples suffice. The proxies are set in the
            order of the calls, so that each layer sees the effect of the proxies before it.

    Returns:
        The number of layers whose proxies were set. Proxies of frozen layers are not set.

    Raises:
        ValueError: If the model does not run on the data, or has no proxies that can be set.

    Example:

    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.training import calibrate_proxies
    >>> model = keras.Sequential([
    ...     keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3), keras_proxynorm.LayerNormProxy(),
    ... ])
    >>> calibrate_proxies(model, np.random.normal(size=(32, 8, 8, 3)))
    1

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743), where proxies are only learned
    """
    check_built_model(model)
    layers = _layers_with_proxies(model)
    if not layers:
        raise argument_error("model", model, "a model that has layers with proxies that are not frozen")
    check_batch("data", model, data)
    return _set_proxies(model, layers, data)


def _layers_with_proxies(model):
    layers = {id(layer): layer for layer in layers_inside(model) if isinstance(layer, ProxyNormalizationLayer)}
    return [layer for layer in layers.values() if layer.proxy is not None and layer.trainable]


def _set_proxies(model, layers, data):
    """Sets the proxies of those of the layers that the model calls; returns how many these are."""
    visited = []

    def set_proxy(layer, mean, stddev):
        layer.proxy.assign(np.stack([mean, stddev - 1]))
        visited.append(layer)

    before = [np.array(keras.ops.convert_to_numpy(layer.proxy)) for layer in layers]  # copies, as PyTorch shares memory
    try:
        visit_normalized_inputs(model, layers, data, set_proxy)
    except BaseException:  # also an interrupt
        for layer, proxy in zip(layers, before, strict=True):
            layer.proxy.assign(proxy)
        raise
    return len(visited)


class CalibrateProxies(keras.callbacks.Callback):
    """Sets the proxies to the data every so many steps of `fit`, as `calibrate_proxies` does.

    In between, proxies are learned, and the model is a function of its weights and of single samples, as always. It
    helps layer norm with large batches, that is with large learning rates and few steps, where proxies fall behind the
    data; docs/accuracy.md has measurements.

    Each calibration costs a forward pass over the data that is not compiled, the first one two.

    Args:
        data: A batch of inputs, as for a call of the model: some dozen samples of the training data.
        every: Positive integer: the number of steps between calibrations. With `steps_per_execution`, the first
            execution that completes so many steps is followed by one. Defaults to 8, which sufficed where 32 did not.

    Raises:
        ValueError: If `every` is not a positive integer. From `fit`: as `calibrate_proxies`.

    Example:

    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.training import CalibrateProxies
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras_proxynorm.LayerNormProxy(name="norm")])
    >>> model.compile("sgd", "mse")
    >>> images = np.random.normal(size=(64, 8, 8, 3))
    >>> history = model.fit(images, images, callbacks=[CalibrateProxies(images[:32], every=1)], verbose=0)
    """

    def __init__(self, data: Any, every: int = 8) -> None:
        super().__init__()
        self.data = data
        self.every = as_positive_integer("every", every)

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._steps, self._calibrated = 0, 0

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._first = self._steps

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._steps = self._first + batch + 1
        if self._steps // self.every > self._calibrated // self.every:
            is_first = self._calibrated == 0
            self._calibrated = self._steps
            self._calibrate(is_first)

    def _calibrate(self, is_first):
        if keras.backend.backend() == "jax":
            # Moves the weights from `fit` into the model; `fit` fetches them from there again.
            self.model.jax_state_sync()
        if is_first:
            calibrate_proxies(self.model, self.data)
        else:
            _set_proxies(self.model, _layers_with_proxies(self.model), self.data)
