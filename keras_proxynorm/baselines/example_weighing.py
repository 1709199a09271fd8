"""Chooses the weight that a sample has in its own statistics at inference, for ghost batch normalization."""

from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_proxynorm.arguments import argument_error, as_choice
from keras_proxynorm.baselines.ghost_batch import GhostBatchNormalization
from keras_proxynorm.compat import layers_inside

__all__ = ["choose_inference_example_weight"]


def choose_inference_example_weight(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    candidates: Iterable[float] = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    monitor: str = "loss",
    mode: str = "min",
    **evaluate_kwargs: Any,
) -> dict[float, float]:
    """Sets the `inference_example_weight` of a trained model to what is best on validation data.

    Nothing is trained: the model is evaluated with each candidate. All `GhostBatchNormalization` layers get the same
    weight. Use data that the model is neither trained nor tested on.

    Args:
        model: A compiled model with `keras_proxynorm.baselines.GhostBatchNormalization` in it.
        x: Validation data, as for ``model.evaluate``, but not a generator: each candidate gets the same data.
        y: Their targets, as for ``model.evaluate``.
        candidates: The weights to try, from 0 to 1. Of equally good ones the first is taken.
        monitor: The name of the loss or metric to go by. Defaults to ``"loss"``.
        mode: ``"min"`` or ``"max"``. Use ``"max"`` for an accuracy. Defaults to ``"min"``.
        **evaluate_kwargs: Further arguments of ``model.evaluate``, such as `batch_size` and `verbose`.

    Returns:
        A dict with the value of `monitor` for each candidate. The model has the best one.

    Raises:
        ValueError: If the model has no such layer, an argument is not of the form above, or no value is a number.

    Example:

    >>> import keras, numpy as np
    >>> from keras_proxynorm.baselines import GhostBatchNormalization, choose_inference_example_weight
    >>> model = keras.Sequential([keras.Input((8,)), GhostBatchNormalization(channel_groups=2), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> values = choose_inference_example_weight(model, np.ones((4, 8)), np.ones(4), candidates=(0, 0.1), verbose=0)
    >>> list(values)
    [0.0, 0.1]

    Reference:

    - [Summers and Dinneen, 2020](https://arxiv.org/abs/1906.03548)
    """
    layers = [layer for layer in layers_inside(model) if isinstance(layer, GhostBatchNormalization)]
    if not layers:
        raise argument_error("model", model, "a model with GhostBatchNormalization layers in it")
    mode = as_choice("mode", mode, ("min", "max"))
    if isinstance(x, Iterator):
        raise argument_error(
            "x", x, "data that can be read again for each candidate: arrays, a keras.utils.PyDataset or a dataset"
        )
    before = [layer.inference_example_weight for layer in layers]
    values: dict[float, float] = {}
    try:
        for candidate in candidates:
            _set(model, layers, [candidate] * len(layers))
            results = model.evaluate(x, y, return_dict=True, **evaluate_kwargs)
            if monitor not in results:
                raise argument_error("monitor", monitor, f"one of {sorted(results)}")
            values[float(candidate)] = float(results[monitor])
        # A NaN is equal to nothing.
        numbers = {weight: value for weight, value in values.items() if value == value}
        if not numbers:
            raise ValueError(f"Of the candidates none gives a {monitor} that is a number. Received: {values}")
        best = min(numbers, key=lambda weight: numbers[weight] if mode == "min" else -numbers[weight])
        before = [best] * len(layers)
    finally:
        _set(model, layers, before)
    return values


def _set(model, layers, weights):
    for layer, weight in zip(layers, weights, strict=True):
        layer.inference_example_weight = weight
    # What is traced has the old weight in it, also in models inside this one.
    for traced in layers_inside(model):
        if isinstance(traced, keras.Model):
            traced.test_function = traced.predict_function = None
