"""ProxyActivation: the affine, activation and proxy normalization alone."""

import inspect

import numpy as np
from backends import numpy
from layers.samples import built, normal

import keras_proxynorm as kp


def test_elements_do_not_see_each_other():
    x = normal(2, 3, 4, 8)
    layer = built(kp.ProxyActivation, x.shape)
    whole, one = numpy(layer(x)), numpy(layer(x[1:, 2:, 1:2]))
    np.testing.assert_allclose(whole[1:, 2:, 1:2], one, atol=1e-6)


def test_without_activation_it_is_the_affine():
    layer = built(lambda: kp.ProxyActivation(activation=None), (None, 4))
    x, gamma, beta = normal(3, 4), numpy(layer.gamma), numpy(layer.beta)
    np.testing.assert_allclose(numpy(layer(x)), gamma * x + beta, rtol=1e-5, atol=1e-6)


def test_it_has_no_statistics():
    assert kp.ProxyActivation().values_per_statistic((None, 4)) is None


def test_signature_is_that_of_the_whole_layers_without_the_normalization():
    whole = dict(inspect.signature(kp.LayerNormProxy.__init__).parameters)
    del whole["epsilon"]
    assert list(whole.values()) == list(inspect.signature(kp.ProxyActivation.__init__).parameters.values())
