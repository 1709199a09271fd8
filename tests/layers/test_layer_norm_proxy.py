"""LayerNormProxy is GroupNormProxy with one group."""

import inspect

import keras
import numpy as np
import pytest
from backends import numpy
from layers.samples import built, normal

import keras_proxynorm as kp


def test_one_group():
    x = normal(3, 5, 4, 8)
    layer = built(kp.LayerNormProxy, x.shape)
    group = kp.GroupNormProxy(1)
    group.build(x.shape)
    group.set_weights(layer.get_weights())
    np.testing.assert_array_equal(numpy(layer(x)), numpy(group(x)))


def test_without_activation_it_is_layer_normalization_over_all_features():
    x = normal(3, 5, 4, 8)
    ours = kp.LayerNormProxy(activation=None)(x)
    theirs = keras.layers.LayerNormalization(axis=(1, 2, 3), epsilon=1e-3)(x)
    np.testing.assert_allclose(numpy(ours), numpy(theirs), atol=1e-5)


def test_signature_is_that_of_the_parent_without_groups():
    parent = dict(inspect.signature(kp.GroupNormProxy.__init__).parameters)
    del parent["groups"]
    assert list(parent.values()) == list(inspect.signature(kp.LayerNormProxy.__init__).parameters.values())


def test_all_values_of_a_sample_share_their_statistics():
    assert kp.LayerNormProxy(axis=1).values_per_statistic((None, 5, 4, 8)) == 160
    assert kp.LayerNormProxy().values_per_statistic((None, None, 8)) is None


def test_groups_are_refused():
    with pytest.raises(ValueError, match="no argument `groups`.*Received: groups=8"):
        kp.LayerNormProxy(groups=8)
