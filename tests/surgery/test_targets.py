"""The number of groups, and which arguments a factory is handed."""

import functools

import keras
import pytest
from hypothesis import given, strategies

from keras_proxynorm.surgery.targets import TARGETS, Target, choose_groups

sizes = strategies.integers(1, 512)


@given(channels=sizes, groups=strategies.integers(1, 64), smallest=strategies.integers(1, 16))
def test_groups_divide_and_are_large_enough_and_none_would_fit_better(channels, groups, smallest):
    def fits(n):
        return channels % n == 0 and n <= groups and channels // n >= smallest

    chosen = choose_groups(channels, groups, smallest)
    assert channels % chosen == 0 and chosen <= max(groups, 1)
    assert fits(chosen) or (chosen == 1 and not any(fits(n) for n in range(1, groups + 1)))
    assert not any(fits(n) for n in range(chosen + 1, groups + 1))


def test_groups_of_the_widths_that_are_in_use():
    widths = {
        11: 1,
        16: 4,
        22: 2,
        24: 6,
        32: 8,
        42: 7,
        44: 11,
        48: 12,
        64: 16,
        80: 20,
        84: 21,
        128: 32,
        728: 28,
        2048: 32,
    }
    assert {channels: choose_groups(channels) for channels in widths} == widths


@pytest.mark.parametrize("name", TARGETS)
def test_every_name_makes_layers(name):
    epsilon = "kernel_epsilon" if name.startswith("weight") else "epsilon"
    target = Target(name, {epsilon: 0.5})
    convolution = keras.layers.Conv2D(8, 3, use_bias=False)
    offered = {"activation": "relu", "channels": 8, "groups": 2, "center": False, "momentum": 0.5, "axis": -1}
    layer = target.make({**offered, "layer": convolution, "name": "norm", "dtype": "float32"})
    assert (layer.name, getattr(layer, epsilon), layer.center, layer.axis) == ("norm", 0.5, False, -1)
    groups = {"layer_norm": 1, "layer_norm_proxy": 1, "instance_norm": -1}
    assert getattr(layer, "groups", 2) == groups.get(name, 2)
    assert getattr(layer, "momentum", 0.5) == 0.5
    assert target.contains_linear is (getattr(layer, "layer", None) is convolution)
    assert target.fuses is (hasattr(layer, "activation") or hasattr(layer, "nonlinearity"))
    plain = target.make({**offered, "activation": None, "layer": convolution, "name": "norm", "dtype": "float32"})
    assert getattr(plain, "activation", keras.activations.linear) is keras.activations.linear
    assert getattr(plain, "nonlinearity", False) is False


def test_a_factory_gets_what_it_names():
    received = {}

    def factory(groups, name, dtype, center=True):
        received.update(groups=groups, center=center, dtype=dtype)
        return keras.layers.Identity(name=name)

    offered = {"activation": "relu", "groups": 4, "axis": 1, "name": "norm", "dtype": "float32"}
    target = Target(factory, {})
    target.make(offered)
    assert not target.fuses and received == {"groups": 4, "center": True, "dtype": "float32"}
    assert Target(functools.partial(factory, groups=3), {}).make(offered) and received["groups"] == 3
