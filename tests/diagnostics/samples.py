"""Models and data that the tests of this folder share."""

import contextlib

import keras
import numpy as np
from backends import BACKEND

from keras_proxynorm.diagnostics.batches import batches

L = keras.layers
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def normal(*shape, seed=0, scale=1.0, offset=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale + offset).astype("float32")


def powers_of(y, axis=-1):
    """The four terms from their definition, in float64, one channel after the other."""
    y = np.moveaxis(np.asarray(y, "float64"), axis, -1)
    y = y.reshape(len(y), -1, y.shape[-1])
    terms = []
    for c in range(y.shape[-1]):
        m = [float(np.mean(y[x, :, c])) for x in range(len(y))]
        s = [float(np.sqrt(np.mean((y[x, :, c] - m[x]) ** 2))) for x in range(len(y))]
        terms.append([np.mean(m) ** 2, np.var(m), np.mean(s) ** 2, np.var(s)])
    return np.mean(terms, axis=0)


def batch_normalized(x, axis=-1, epsilon=1e-3):
    x = np.asarray(x, "float64")
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def group_normalized(x, groups, axis=-1, epsilon=1e-3):
    x = np.moveaxis(np.asarray(x, "float64"), axis, -1)
    g = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    y = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + epsilon)
    return np.moveaxis(y.reshape(x.shape), -1, axis)


def randomize(model, seed=0):
    """Random scales, one of them 0, random offsets and random moving statistics."""
    rng = np.random.default_rng(seed)
    for w in model.weights:
        if w.name in ("gamma", "scale"):
            value = rng.normal(1, 0.5, w.shape)
            value.flat[0] = 0
        elif w.name in ("beta", "bias", "moving_mean"):
            value = rng.normal(0, 0.5, w.shape)
        elif w.name == "moving_variance":
            value = rng.uniform(0.5, 2, w.shape)
        elif w.name == "proxy":
            value = rng.normal(0, 0.2, w.shape)
        else:
            continue
        w.assign(value)
    return model


def small(norm=None, units=3, name="m"):
    """Convolution, norm, ReLU, pooling, logits."""
    norm = L.BatchNormalization(name="norm") if norm is None else norm
    layers = [keras.Input((6, 6, 3)), L.Conv2D(8, 3, name="conv"), norm, L.ReLU(name="relu")]
    return keras.Sequential([*layers, L.GlobalAveragePooling2D(), L.Dense(units, name="logits")], name=name)


def images(count=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 6, 6, 3)).astype("float32"), rng.integers(3, size=count)


def single(layer, shape):
    """A model of nothing but a layer."""
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def all_state(model):
    """Everything that a diagnosis could change."""
    values = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    if getattr(model, "optimizer", None) is not None:
        values += [np.array(keras.ops.convert_to_numpy(v)) for v in model.optimizer.variables]
    for metric in model.metrics:
        values += [np.array(keras.ops.convert_to_numpy(v)) for v in metric.variables]
    return values


@contextlib.contextmanager
def unchanged(model, x=None):
    """Checks that a model is the same afterwards, when there is an exception, too."""
    every = [model, *model._flatten_layers(include_self=False)]
    before, keys = all_state(model), [sorted(vars(layer)) for layer in every]
    flags = [layer.trainable for layer in every]
    outputs = None if x is None else _outputs(model, x)
    try:
        yield
    finally:
        after = all_state(model)
        assert len(before) == len(after)
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
        assert [sorted(vars(layer)) for layer in every] == keys
        assert all("call" not in vars(layer) for layer in every)
        assert [layer.trainable for layer in every] == flags
        assert not keras.src.backend.in_stateless_scope()
        if outputs is not None:
            for a, b in zip(outputs, _outputs(model, x), strict=True):
                np.testing.assert_array_equal(a, b)


def _outputs(model, x):
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(x, training=False))]


def lists(data, **options):
    """What `batches` yields, as NumPy arrays."""
    return [keras.tree.map_structure(_array, batch) for batch in batches(data, **options)]


def _array(x):
    return None if x is None else keras.ops.convert_to_numpy(x) if keras.ops.is_tensor(x) else np.asarray(x)


class Numbers(keras.utils.PyDataset):
    """Unequal batches of given arrays, as many as are asked for or unknown."""

    def __init__(self, parts, unknown=False):
        super().__init__()
        self.parts, self.unknown = parts, unknown

    @property
    def num_batches(self):
        return None if self.unknown else len(self.parts)

    def __getitem__(self, index):
        return self.parts[index % len(self.parts)]


__all__ = [name for name in dir() if not name.startswith("_")] + ["BACKEND"]
