"""The moments that training computes most, with gradients by hand: on TensorFlow each small operation counts."""

import functools
import math
from collections.abc import Callable

import tensorflow as tf

from keras_proxynorm.moments.closed_forms import CLIP
from keras_proxynorm.moments.closed_forms import rectifier_moments
from keras_proxynorm.moments.gradients import with_gradient
from keras_proxynorm.moments.quadrature import TINY
from keras_proxynorm.moments.quadrature import smooth_moments
from keras_proxynorm.moments.quadrature import trapezoid

__all__ = ["fast_rectifier_moments", "fast_smooth_moments"]


def fast_rectifier_moments(kink: float, left: float, right: float, mean, stddev):
    """`rectifier_moments`; their derivatives share the normal distribution function and density with the values."""

    def forward(mean, stddev):
        change = right - left
        distance = mean - kink
        t = tf.clip_by_value(distance / (stddev + TINY), -CLIP, CLIP)
        cdf = 0.5 * tf.math.erfc(t * -math.sqrt(0.5))
        pdf = tf.exp(-0.5 * tf.square(t)) * math.sqrt(0.5 / math.pi)
        g = t * cdf + pdf
        unit_variance = left * left + 2.0 * left * change * cdf + change * change * (cdf - g * (g - t))
        unit_variance = tf.nn.relu(unit_variance)
        output_mean = left * distance + change * (distance * cdf + stddev * pdf)
        output_variance = tf.square(stddev) * unit_variance

        def backward(d_mean, d_variance):
            slope = 2.0 * left * change * pdf + change * change * (pdf - cdf * (g - t) - g * (cdf - 1.0))
            scaled = d_variance * stddev
            return [
                d_mean * (left + change * cdf) + scaled * slope,
                d_mean * (change * pdf) + scaled * (2.0 * unit_variance - t * slope),
            ]

        return (output_mean, output_variance), backward

    return with_gradient(functools.partial(rectifier_moments, kink, left, right), forward)(mean, stddev)


def fast_smooth_moments(function: Callable, mean, stddev, nodes: int):
    """`smooth_moments`; the derivatives take one derivative of the function at the nodes of the rule."""

    def forward(mean, stddev):
        shape = (-1,) + (1,) * len(mean.shape)
        points, weights = (tf.constant(array.reshape(shape), mean.dtype) for array in trapezoid(nodes))
        arguments = mean + stddev * points
        center = function(mean)
        deviations = function(arguments) - center
        shift = tf.reduce_sum(weights * deviations, axis=0)
        deviations = deviations - shift
        variance = tf.reduce_sum(weights * tf.square(deviations), axis=0)

        def backward(d_mean, d_variance):
            upstream = weights * (d_mean + 2.0 * d_variance * deviations)
            with tf.GradientTape() as tape:
                tape.watch(arguments)
                values = function(arguments)
            gradient = tape.gradient(values, arguments, upstream, tf.UnconnectedGradients.ZERO)
            return [tf.reduce_sum(gradient, axis=0), tf.reduce_sum(points * gradient, axis=0)]

        return (center + shift, variance), backward

    return with_gradient(functools.partial(smooth_moments, function, nodes=nodes), forward)(mean, stddev)
