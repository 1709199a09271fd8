"""Surgery and folding of random graphs: layers shared, called by keyword, nested, and read in several ways."""

import keras
import numpy as np
import pytest
from backends import BACKEND
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops
from surgery.stand_ins import StandIn, assert_same_outputs, image, outputs, randomize

import keras_proxynorm as kp
from keras_proxynorm.folding.folding import fold_with_report

CHANNELS = 4


class Shared:
    """Layers that several calls may share, and names that are new."""

    def __init__(self, draw):
        self.draw = draw
        self.layers: dict = {}
        self.count = 0

    def layer(self, make, prefix):
        if self.draw(st.integers(0, 3)) == 0:
            return self.layers.setdefault(prefix, make(name=f"shared_{prefix}"))
        self.count += 1
        return make(name=f"{prefix}{self.count}")


def call(draw, layer, x):
    return layer(inputs=x) if draw(st.booleans()) else layer(x)


def norm(draw, shared, x):
    return call(draw, shared.layer(layers.BatchNormalization, "norm"), x)


def activation(draw, shared, x):
    kind = draw(st.sampled_from(["relu", "relu", "function", "silu", "softmax"]))
    if kind == "function":
        return ops.relu(x)
    if kind == "softmax":
        return layers.Softmax()(x)
    make = layers.ReLU if kind == "relu" else lambda name: layers.Activation("silu", name=name)
    return call(draw, shared.layer(make, kind), x)


def linear(draw, shared, x):
    size, padding = draw(st.sampled_from([(1, "valid"), (3, "same"), (1, "same")]))
    own = draw(st.sampled_from([None, None, None, "relu"]))

    def make(name):
        return layers.Conv2D(CHANNELS, size, padding=padding, use_bias=size == 1, activation=own, name=name)

    return call(draw, shared.layer(make, f"conv{size}{padding}{own or ''}"), x)


def join(draw, shared, x, others):
    other = draw(st.sampled_from(others))
    kind = draw(st.sampled_from(["add", "multiply", "operator", "concatenate"]))
    if kind == "operator":
        return x + other
    if kind == "concatenate":
        return layers.Conv2D(CHANNELS, 1)(layers.Concatenate()([x, other]))
    return (layers.Add() if kind == "add" else layers.Multiply())([x, other])


def graph(draw, shared, inputs, steps, depth):
    tensors = [inputs]
    for _ in range(steps):
        x = draw(st.sampled_from(tensors[-3:]))
        kind = draw(st.sampled_from(["norm", "norm", "activation", "activation", "linear", "join", "nested"]))
        if kind == "join":
            tensors.append(join(draw, shared, x, tensors[1:] or tensors))
        elif kind == "nested" and depth:
            inner = keras.Input(x.shape[1:])
            end = graph(draw, shared, inner, 3, depth - 1)[-1]
            model = keras.Model(inner, end)
            tensors.append(model(x, training=False) if draw(st.booleans()) else model(x))
        else:
            step = {"norm": norm, "activation": activation}.get(kind, linear)
            tensors.append(step(draw, shared, x))
    return tensors


@st.composite
def models(draw):
    inputs = keras.Input((5, 5, CHANNELS))
    tensors = graph(draw, Shared(draw), inputs, draw(st.integers(2, 8)), 1)
    ends = [tensors[-1], *draw(st.lists(st.sampled_from(tensors[1:]), max_size=2, unique_by=id))]
    return randomize(keras.Model(inputs, ends if len(ends) > 1 else ends[0]))


def check(model):
    x = image(2, 5, 5, CHANNELS) / 255
    replaced, report = kp.replace_normalization(model, to=StandIn, return_report=True)
    assert_same_outputs(model, replaced, x)
    assert replaced.output_names == model.output_names
    names = {layer.name for inner in replaced._flatten_layers() for layer in getattr(inner, "layers", [])}
    assert {name for layer in report.layers for name in layer.names} <= names
    for through_gates in (False, True):
        folded, _ = fold_with_report(model, through_gates)
        assert folded.output_names == model.output_names
        for ours, theirs in zip(outputs(folded, x), outputs(model, x), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=40 if BACKEND == "tensorflow" else 8, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=models())
def test_random_graphs(model):
    check(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=models())
def test_many_random_graphs(model):
    check(model)
