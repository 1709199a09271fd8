"""The layers that the tests of this folder run over, and data for them."""

import statistics

import keras
import numpy as np

import keras_proxynorm as kp

# Every layer, and arguments that a bug could hide in.
LAYERS = {
    "group": lambda **kw: kp.GroupNormProxy(groups=4, **kw),
    "layer": lambda **kw: kp.LayerNormProxy(**kw),
    "instance": lambda **kw: kp.GroupNormProxy(groups=-1, **kw),
    "activation": lambda **kw: kp.ProxyActivation(**kw),
    "group_leaky": lambda **kw: kp.GroupNormProxy(groups=4, activation=keras.layers.LeakyReLU(0.1), **kw),
    "group_silu": lambda **kw: kp.GroupNormProxy(groups=2, activation="silu", **kw),
    "group_relu6": lambda **kw: kp.GroupNormProxy(groups=2, activation=keras.layers.ReLU(max_value=6), **kw),
    "group_plain": lambda **kw: kp.GroupNormProxy(groups=4, activation=None, **kw),
    "group_no_affine": lambda **kw: kp.GroupNormProxy(groups=4, center=False, scale=False, **kw),
    "layer_quantiles": lambda **kw: kp.LayerNormProxy(proxy_moments="quantiles", num_quantiles=64, **kw),
}


def randomize(layer, seed=0):
    """Moves the norm parameters of a built layer or model far from their initial values."""
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        if weight.name in ("gamma", "beta", "proxy"):
            weight.assign(weight + keras.ops.convert_to_tensor(0.3 * rng.standard_normal(weight.shape), weight.dtype))
    return layer


def built(make, shape, **kwargs):
    """A layer built for inputs of this shape, with random norm parameters."""
    layer = make(**kwargs)
    layer.build(shape)
    return randomize(layer)


def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def reference(layer, x):
    """A layer's output in float64, from the formulas of the paper, with the moments as plain sums."""
    x = np.moveaxis(np.asarray(x, "float64"), layer.axis, -1)
    groups = getattr(layer, "groups", None)
    if groups is not None:
        groups = x.shape[-1] if groups == -1 else groups
        grouped = x.reshape(*x.shape[:-1], groups, -1)
        axes = (*range(1, x.ndim - 1), x.ndim)
        mean, variance = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
        x = ((grouped - mean) / np.sqrt(variance + layer.epsilon)).reshape(x.shape)
    gamma = 1.0 if layer.gamma is None else keras.ops.convert_to_numpy(layer.gamma).astype("float64")
    beta = 0.0 if layer.beta is None else keras.ops.convert_to_numpy(layer.beta).astype("float64")
    h = gamma * x + beta
    if layer.proxy is not None:
        proxy_mean, proxy_stddev = keras.ops.convert_to_numpy(layer.proxy).astype("float64")
        proxy_stddev = 1 + proxy_stddev
        function = {
            "silu": lambda u: u / (1 + np.exp(-u)),
            "relu": lambda u: np.maximum(u, 0),
            "re_lu": lambda u: np.clip(u, 0, 6),
            "leaky_re_lu": lambda u: np.maximum(u, 0.1 * u),
        }[getattr(layer.activation, "__name__", "") or layer.activation.name.rstrip("_0123456789")]
        if layer.proxy_moments == "quantiles":
            n = layer.num_quantiles
            t = np.array([statistics.NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)])[:, None]
            weights = np.full_like(t, 1 / n)
        else:
            t = np.linspace(-10, 10, 200_001)[:, None]
            weights = np.exp(-(t**2) / 2)
            weights /= weights.sum()
        values = function(gamma * (proxy_mean + proxy_stddev * t) + beta)
        mean = np.sum(weights * values, axis=0)
        variance = np.sum(weights * np.square(values - mean), axis=0)
        h = (function(h) - mean) / np.sqrt(variance + layer.proxy_epsilon)
    return np.moveaxis(h, -1, layer.axis)
