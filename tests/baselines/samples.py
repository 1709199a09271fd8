"""The baselines that the tests of this folder run over, and data for them."""

import keras
import numpy as np
from backends import numpy

from keras_proxynorm import baselines as bl

__all__ = ["ALONE", "BASELINES", "BATCH", "CONTAINING", "built", "convolution", "normal", "randomize"]


def convolution(**kwargs):
    return keras.layers.Conv2D(8, 3, padding="same", use_bias=False, **kwargs)


# Arguments that a bug could hide in. Those that take the place of a normalization alone, ...
ALONE = {
    "ghost": lambda **kw: bl.GhostBatchNormalization(3, **kw),
    "ghost_hybrid": lambda **kw: bl.GhostBatchNormalization(2, 4, inference_example_weight=0.25, **kw),
    "instance_enhancement": lambda **kw: bl.InstanceEnhancementBatchNormalization(**kw),
    "batch_group": lambda **kw: bl.BatchGroupNormalization(4, **kw),
    "batch_group_parts": lambda **kw: bl.BatchGroupNormalization(16, **kw),
    "variance": lambda **kw: bl.VarianceNormalization(**kw),
    "filter_response": lambda **kw: bl.FilterResponseNormalization(**kw),
    "filter_response_plain": lambda **kw: bl.FilterResponseNormalization(nonlinearity=False, **kw),
    "evonorm_s0": lambda **kw: bl.EvoNormS0(4, **kw),
    "evonorm_b0": lambda **kw: bl.EvoNormB0(**kw),
}
# ... and those that contain a linear layer, which say what its data_format is by `axis`.
CONTAINING = {
    "cross_iteration": lambda layer, **kw: bl.CrossIterationBatchNormalization(layer, window=3, **kw),
    "convolutional": lambda layer, **kw: bl.ConvolutionalNormalization(layer, **kw),
    "weight_standardization": lambda layer, **kw: bl.WeightStandardization(layer, activation="silu", **kw),
    "weight_normalization": lambda layer, **kw: bl.WeightNormalization(layer, **kw),
}
BASELINES = {
    **ALONE,
    **{name: lambda make=make, **kw: make(convolution(), **kw) for name, make in CONTAINING.items()},
}
# Those whose output depends on the batch in training.
BATCH = (
    *("ghost", "ghost_hybrid", "instance_enhancement", "batch_group", "batch_group_parts", "variance", "evonorm_b0"),
    "cross_iteration",
)


def randomize(layer, seed=0):
    """Gives a built layer weights that a seed decides, with vectors far from their initial values."""
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        if "kernel" in weight.name:
            weight.assign(0.2 * rng.standard_normal(weight.shape))
        if len(weight.shape) == 1 and "moving_variance" not in weight.name:
            weight.assign(numpy(weight.value) + 0.3 * rng.standard_normal(weight.shape))
        elif "moving_variance" in weight.name:
            weight.assign(rng.uniform(0.5, 2, weight.shape))
    return layer


def built(make, shape, **kwargs):
    """A layer built for inputs of this shape, with random vectors."""
    layer = make(**kwargs)
    layer.build(shape)
    return randomize(layer)


def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
