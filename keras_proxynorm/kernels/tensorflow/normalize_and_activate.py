"""Normalize, affine and activation in as few passes over memory as TensorFlow allows, with a gradient by hand."""

import keras
import tensorflow as tf

from keras_proxynorm.compat import is_compiled_by_xla
from keras_proxynorm.kernels import channels
from keras_proxynorm.kernels.compilation import barrier
from keras_proxynorm.kernels.reductions import position_sums, reduction_method
from keras_proxynorm.kernels.statistics import group_moments, group_pivot, group_size, moments_about_pivot
from keras_proxynorm.kernels.tensorflow.custom_gradients import with_gradient
from keras_proxynorm.moments import ElementwiseActivation, Tensor

__all__ = ["normalize_and_activate"]


def normalize_and_activate(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    output_scale: Tensor,
    output_offset: Tensor,
    activation: ElementwiseActivation,
    groups: int,
    axis: int,
    epsilon: float,
) -> Tensor:
    """``output_scale * activation(scale * y + offset) + output_offset`` for ``y = (x - mean) / sqrt(var + epsilon)``.

    The gradient takes two sums over the positions, of the gradient ``g`` before the affine and of ``g (x - mean)``, and
    keeps as few whole tensors as batch normalization does: `x`, and the output or the input of the activation. It can
    be differentiated again, to any order; that goes by automatic differentiation of the formula.

    Scales and offsets have the shape ``(channels,)``, and output scales are positive. The other arguments, and what is
    returned, are those of `keras_proxynorm.kernels.group_normalize_and_activate`.
    """
    vectors = [scale, offset, output_offset, output_scale]
    if activation.is_homogeneous:
        vectors = [scale * output_scale, offset * output_scale, output_offset]
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

    def formula(self, x, scale, offset, output_offset, output_scale=None):
        """What `forward` computes, for automatic differentiation."""
        pivot, distance, variance = group_moments(x, self.groups, self.axis)
        y = (x - pivot - distance) * tf.math.rsqrt(variance + self.epsilon)
        scale, offset, output_offset, output_scale = (
            channels.broadcast(vector, x, self.axis) for vector in (scale, offset, output_offset, output_scale)
        )
        z = self.activation.function(y * scale + offset)
        return (z if output_scale is None else z * output_scale) + output_offset

    def forward(self, centered, scale, offset, output_offset, output_scale=None):
        # Small tensors have the shape (batch, groups, channels of a group), with size 1 where channels agree.
        distance, variance = moments_about_pivot(centered, self.groups, self.axis)
        inverse = tf.math.rsqrt(variance + self.epsilon)
        scale, offset, output_offset, output_scale = map(self.split, (scale, offset, output_offset, output_scale))
        # Of the centered input, for each sample.
        total_scale = inverse * scale
        total_offset = offset - distance * total_scale
        # Repeated for each sample, because TensorFlow broadcasts along one axis faster than along two.
        repeat = tf.zeros_like(total_scale)
        h = None
        if self.activation.is_identity:
            a, b = self.merge(centered, total_scale, total_offset + output_offset)
            output = centered * a + b
        elif self.is_relu:
            # relu(h) + d = max(h + d, d), and its gradient needs the output alone.
            a, b, output_offset = self.merge(
                centered, total_scale, total_offset + output_offset, repeat + output_offset
            )
            output = tf.maximum(centered * a + b, output_offset)
        else:
            a, b, output_offset = self.merge(centered, total_scale, total_offset, repeat + output_offset)
            h = centered * a + b
            output = self.activation.function(h)
            if output_scale is not None:
                output = output * self.merge(centered, repeat + output_scale)[0]
            output = output + output_offset
        kept = (output, h, centered, distance, inverse, scale, output_offset, output_scale)

        def backward(upstream):
            # Otherwise TensorFlow computes what it can of the gradient early, and holds it until the rest is there.
            with tf.control_dependencies([upstream]):
                return self.backward(upstream, *kept)

        return output, backward

    def backward(self, upstream, output, h, centered, distance, inverse, scale, output_offset, output_scale):
        d_output_offset = self.vector(position_sums(upstream, self.axis))
        d_output_scale = []
        if self.activation.is_identity:
            dh = upstream
        elif self.is_relu:
            dh = tf.raw_ops.ReluGrad(gradients=upstream, features=output - output_offset)
        else:
            products, dh = _products(self.activation.function, h, upstream)
            if output_scale is not None:
                d_output_scale = [self.vector(position_sums(products, self.axis))]
                scale = scale * output_scale
        sums = self.split(barrier(position_sums(dh, self.axis)))
        # Of products with the distance from the mean, in two steps: of those with x it would be rounding errors.
        products = self.split(barrier(position_sums(dh * centered, self.axis))) - distance * sums
        count = group_size(centered, self.groups, self.axis)
        mean = tf.reduce_sum(sums * scale, axis=2, keepdims=True) / count
        covariance = tf.reduce_sum(products * scale, axis=2, keepdims=True) / count
        total_scale = inverse * scale
        by_variance = -(inverse**3) * covariance
        constant = -inverse * mean - by_variance * distance
        repeat = tf.zeros_like(total_scale)
        a, b, c = self.merge(centered, total_scale, repeat + by_variance, repeat + constant)
        dx = dh * a + (centered * b + c)
        if output_scale is not None:
            products, sums = products * output_scale, sums * output_scale
        d_scale, d_offset = self.vector(products * inverse), self.vector(sums)
        return [dx, d_scale, d_offset, d_output_offset, *d_output_scale]

    def split(self, values):
        return channels.by_groups(values, self.groups, self.axis)

    def merge(self, like, *values):
        """The inverse of `split`, of values that are then broadcast to `like`."""
        return _materialize(*(channels.by_channels(value, like, self.axis) for value in values))

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

    On CPU it fuses even the error function into loops over whole images. What it does not fuse is a matrix product;
    this one is exact. Compilers for accelerators weigh that by themselves.
    """
    if not is_compiled_by_xla() or reduction_method(tensors[0]) != "matmul":
        return tensors
    half = tf.constant([[0.5, 0.5]], tensors[0].dtype)
    return [tf.reshape(half @ tf.broadcast_to(tf.reshape(x, (1, -1)), (2, tf.size(x))), tf.shape(x)) for x in tensors]
