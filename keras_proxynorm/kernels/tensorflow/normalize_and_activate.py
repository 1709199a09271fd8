"""Normalize, affine and activation in as few passes over memory as TensorFlow allows, with a gradient by hand."""

import keras
import tensorflow as tf

from keras_proxynorm.kernels import channels
from keras_proxynorm.kernels.compilation import barrier
from keras_proxynorm.kernels.compilation import is_compiled_by_xla
from keras_proxynorm.kernels.reductions import position_sums
from keras_proxynorm.kernels.reductions import reduction_method
from keras_proxynorm.kernels.statistics import group_moments
from keras_proxynorm.kernels.statistics import group_pivot
from keras_proxynorm.kernels.statistics import group_size
from keras_proxynorm.kernels.statistics import moments_about_pivot
from keras_proxynorm.kernels.tensorflow.custom_gradients import with_gradient
from keras_proxynorm.moments import ElementwiseActivation

__all__ = ["normalize_and_activate"]


def normalize_and_activate(
    x, scale, offset, factor, shift, activation: ElementwiseActivation, groups: int, axis: int, epsilon: float
):
    """``factor * activation(scale * y + offset) - shift`` for the normalized ``y = (x - mean) / sqrt(var + epsilon)``.

    The gradient takes two sums over the positions, of the gradient ``g`` before the affine and of ``g (x - mean)``, and
    keeps as few whole tensors as batch normalization does: `x`, and the output or the input of the activation. It can
    be differentiated again, to any order; that goes by automatic differentiation of the formula.

    Args:
        x: Float tensor of rank 2 or more; axis 0 is the batch.
        scale: Tensor of shape ``(channels,)``.
        offset: Tensor of shape ``(channels,)``.
        factor: Tensor of shape ``(channels,)``.
        shift: Tensor of shape ``(channels,)``.
        activation: The activation.
        groups: Number of groups of channels that share their statistics.
        axis: Index of the channel axis, positive.
        epsilon: Added to the variance.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    folds = activation.slopes is not None and activation.kinks in ((), (0.0,))
    if folds:
        # Such a function commutes with the positive factor.
        scale, offset, factor = scale * factor, offset * factor, None
    vectors = [scale, offset, shift] if folds else [scale, offset, shift, factor]
    (pivot,) = _materialize(group_pivot(x, groups, axis))
    # Not in the step: its input is kept for the gradient, and then nobody needs `x`, which is as large.
    centered = x - pivot
    step = _Step(activation, groups, axis, epsilon)
    return with_gradient(step.formula, step.forward)(centered, *vectors)


class _Step:
    """The function of the input without its pivot, and its gradient; an object because both need all the settings."""

    def __init__(self, activation, groups, axis, epsilon):
        self.activation, self.groups, self.axis, self.epsilon = activation, groups, axis, epsilon
        self.is_relu = activation.slopes == (0.0, 1.0)

    def formula(self, x, scale, offset, shift, factor=None):
        """What `forward` computes, for automatic differentiation."""
        pivot, distance, variance = group_moments(x, self.groups, self.axis)
        y = (x - pivot - distance) * tf.math.rsqrt(variance + self.epsilon)
        scale, offset, shift, factor = (channels.broadcast(v, x, self.axis) for v in (scale, offset, shift, factor))
        z = self.activation.function(y * scale + offset)
        return (z if factor is None else z * factor) - shift

    def forward(self, centered, scale, offset, shift, factor=None):
        # Small tensors have the shape (batch, groups, channels of a group), with size 1 where channels agree.
        distance, variance = moments_about_pivot(centered, self.groups, self.axis)
        inverse = tf.math.rsqrt(variance + self.epsilon)
        scale, offset, shift, factor = (self.split(vector) for vector in (scale, offset, shift, factor))
        slope = inverse * scale
        intercept = offset - distance * slope
        # Repeated for each sample, because TensorFlow broadcasts along one axis faster than along two.
        repeat = tf.zeros_like(slope)
        factor_of_samples = None if factor is None else self.merge(repeat + factor, centered)
        h = None
        if self.activation.is_identity:
            slope, intercept = _materialize(self.merge(slope, centered), self.merge(intercept - shift, centered))
            output = centered * slope + intercept
        elif self.is_relu:
            # r relu(h) - s = max(r h - s, -s), and its gradient needs the output alone.
            slope, intercept, shift = _materialize(
                self.merge(slope, centered),
                self.merge(intercept - shift, centered),
                self.merge(repeat - shift, centered),
            )
            output = tf.maximum(centered * slope + intercept, shift)
        else:
            slope, intercept, shift = _materialize(
                self.merge(slope, centered), self.merge(intercept, centered), self.merge(repeat + shift, centered)
            )
            h = centered * slope + intercept
            output = self.activation.function(h)
            if factor is not None:
                (factor_of_samples,) = _materialize(factor_of_samples)
                output = output * factor_of_samples
            output = output - shift
        kept = (output, h, centered, distance, inverse, scale, shift, factor)

        def backward(upstream):
            # Otherwise TensorFlow computes what it can of the gradient early, and holds it until the rest is there.
            with tf.control_dependencies([upstream]):
                return self.backward(upstream, *kept)

        return output, backward

    def backward(self, upstream, output, h, centered, distance, inverse, scale, shift, factor):
        d_shift = -self.vector(position_sums(upstream, self.axis))
        d_factor = []
        if self.activation.is_identity:
            dh = upstream
        elif self.is_relu:
            dh = tf.raw_ops.ReluGrad(gradients=upstream, features=output - shift)
        else:
            products, dh = _products(self.activation.function, h, upstream)
            if factor is not None:
                d_factor = [self.vector(position_sums(products, self.axis))]
                scale = scale * factor
        sums = self.split(barrier(position_sums(dh, self.axis)))
        # Of products with the distance from the mean, in two steps: of those with x it would be rounding errors.
        products = self.split(barrier(position_sums(dh * centered, self.axis))) - distance * sums
        count = group_size(centered, self.groups, self.axis)
        mean = tf.reduce_sum(sums * scale, axis=2, keepdims=True) / count
        covariance = tf.reduce_sum(products * scale, axis=2, keepdims=True) / count
        slope = inverse * scale
        inclination = -(inverse**3) * covariance
        constant = -inverse * mean - inclination * distance
        repeat = tf.zeros_like(slope)
        slope, inclination, constant = _materialize(
            *(self.merge(value, centered) for value in (slope, repeat + inclination, repeat + constant))
        )
        dx = dh * slope + (centered * inclination + constant)
        factor = 1.0 if factor is None else factor
        return [dx, self.vector(products * inverse * factor), self.vector(sums * factor), d_shift, *d_factor]

    def split(self, values):
        return channels.by_groups(values, self.groups, self.axis)

    def merge(self, values, like):
        return channels.by_channels(values, like, self.axis)

    def vector(self, sums):
        """Sums over the samples of what has been summed over the positions, as a vector of the channels."""
        return tf.reshape(tf.reduce_sum(sums, axis=0), (-1,))


def _products(function, h, upstream):
    """``upstream * function(h)`` and ``upstream * function'(h)``."""
    if function is keras.activations.silu:
        # With z = h sigmoid(h), its derivative is sigmoid(h) + z (1 - sigmoid(h)).
        sigmoid = tf.sigmoid(h)
        products = h * sigmoid * upstream
        return products, (upstream - products) * sigmoid + products
    with tf.GradientTape() as tape:
        tape.watch(h)
        z = function(h)
    return upstream * z, tape.gradient(z, h, upstream, tf.UnconnectedGradients.ZERO)


def _materialize(*tensors):
    """Keeps XLA from computing small tensors anew for each element of a large one that they are broadcast to.

    On CPU it fuses even the error function into loops over whole images. What it does not fuse is a product; this one
    is exact. Compilers for accelerators weigh that by themselves.
    """
    if not is_compiled_by_xla() or reduction_method(tensors[0]) != "matmul":
        return tensors
    half = tf.constant([[0.5, 0.5]], tensors[0].dtype)
    return [tf.reshape(half @ tf.broadcast_to(tf.reshape(x, (1, -1)), (2, tf.size(x))), tf.shape(x)) for x in tensors]
