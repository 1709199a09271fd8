"""Normalize, affine and activation in as few passes over memory as TensorFlow allows, with a gradient by hand."""

import keras
import tensorflow as tf

from keras_proxynorm.kernels.compilation import is_compiled_by_xla
from keras_proxynorm.kernels.reductions import position_sums
from keras_proxynorm.kernels.reductions import reduction_method
from keras_proxynorm.kernels.statistics import group_mean
from keras_proxynorm.kernels.statistics import group_moments
from keras_proxynorm.kernels.statistics import group_pivot
from keras_proxynorm.kernels.statistics import moments_about_pivot
from keras_proxynorm.moments import ElementwiseActivation

__all__ = ["normalize_and_activate"]


def normalize_and_activate(
    x, scale, offset, factor, shift, activation: ElementwiseActivation, groups: int, axis: int, epsilon: float
):
    """``factor * activation(scale * y + offset) - shift`` for the normalized ``y = (x - mean) / sqrt(var + epsilon)``.

    The derivatives of the statistics are put together by hand, from two sums over the positions: of the gradient ``g``
    before the affine, and of ``g (x - mean)``. Whole tensors are kept for it
    as few as for batch normalization: `x`, and the output or the input of the activation. It can be
    differentiated again, to any order; that goes by automatic differentiation of the formula.

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
    return _Step(activation, groups, axis, epsilon)(x, *vectors)


class _Step:
    """The function with its gradient; an object because both need all the settings."""

    def __init__(self, activation, groups, axis, epsilon):
        self.activation, self.groups, self.axis, self.epsilon = activation, groups, axis, epsilon
        self.is_relu = activation.slopes == (0.0, 1.0)

    def formula(self, x, scale, offset, shift, factor=None):
        """What `__call__` computes, for automatic differentiation."""
        pivot, distance, variance = group_moments(x, self.groups, self.axis)
        y = (x - pivot - distance) * tf.math.rsqrt(variance + self.epsilon)
        z = self.activation.function(y * self.broadcast(scale, x) + self.broadcast(offset, x))
        return (z if factor is None else z * self.broadcast(factor, x)) - self.broadcast(shift, x)

    def __call__(self, *inputs):
        @tf.custom_gradient
        def step(*inputs):
            output, kept = self.forward(*inputs)

            def gradient(upstream):
                @tf.custom_gradient
                def differentiable_gradient(upstream, *inputs):
                    def second(*upstreams):
                        return self.gradient_of_gradient(upstream, inputs, upstreams)

                    return self.backward(upstream, *kept), second

                return differentiable_gradient(upstream, *inputs)

            return output, gradient

        return step(*inputs)

    def gradient_of_gradient(self, upstream, inputs, upstreams):
        with tf.GradientTape() as outer:
            outer.watch([upstream, *inputs])
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                output = self.formula(*inputs)
            gradients = inner.gradient(output, inputs, upstream)
        return outer.gradient(
            gradients, [upstream, *inputs], upstreams, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )

    def forward(self, x, scale, offset, shift, factor=None):
        (pivot,) = _materialize(group_pivot(x, self.groups, self.axis))
        centered = x - pivot
        distance, variance = moments_about_pivot(centered, self.groups, self.axis)
        inverse = tf.math.rsqrt(variance + self.epsilon)
        slope = inverse * self.broadcast(scale, x)
        intercept = self.broadcast(offset, x) - distance * slope
        # Repeated for each sample, because TensorFlow broadcasts along one axis faster than along two.
        repeat = tf.zeros_like(slope)
        shift = repeat + self.broadcast(shift, x)
        factor = None if factor is None else repeat + self.broadcast(factor, x)
        h = None
        if self.activation.is_identity:
            slope, intercept = _materialize(slope, intercept - shift)
            output = centered * slope + intercept
        elif self.is_relu:
            # r relu(h) - s = max(r h - s, -s), and its gradient needs the output alone.
            slope, intercept, shift = _materialize(slope, intercept - shift, -shift)
            output = tf.maximum(centered * slope + intercept, shift)
        elif factor is None:
            slope, intercept, shift = _materialize(slope, intercept, shift)
            h = centered * slope + intercept
            output = self.activation.function(h) - shift
        else:
            slope, intercept, factor, shift = _materialize(slope, intercept, factor, shift)
            h = centered * slope + intercept
            output = self.activation.function(h) * factor - shift
        return output, (output, h, centered, distance, inverse, scale, shift, factor)

    def backward(self, upstream, output, h, centered, distance, inverse, scale, shift, factor):
        d_shift = -self.channel_sums(position_sums(upstream, self.axis))
        d_factor = []
        if self.activation.is_identity:
            dh = upstream
        elif self.is_relu:
            dh = tf.raw_ops.ReluGrad(gradients=upstream, features=output - shift)
        else:
            products, dh = _products(self.activation.function, h, upstream)
            if factor is not None:
                d_factor = [self.channel_sums(position_sums(products, self.axis))]
        sums = position_sums(dh, self.axis)
        # Of products with the distance from the mean, in two steps: of those with x it would be rounding errors.
        products = position_sums(dh * centered, self.axis) - distance * sums
        if factor is not None:
            sums, products = sums * factor, products * factor
        d_scale, d_offset = self.channel_sums(products * inverse), self.channel_sums(sums)
        count = _position_count(centered, self.axis)
        scale = self.broadcast(scale, centered)
        mean = group_mean(sums * scale, self.groups, self.axis) / count
        covariance = group_mean(products * scale, self.groups, self.axis) / count
        inclination = -(inverse**3) * covariance
        slope, inclination, constant = _materialize(
            inverse * scale if factor is None else inverse * scale * factor,
            inclination,
            -inverse * mean - inclination * distance,
        )
        dx = dh * slope + (centered * inclination + constant)
        return [dx, d_scale, d_offset, d_shift, *d_factor]

    def broadcast(self, vector, x):
        return tf.reshape(vector, [-1 if i == self.axis else 1 for i in range(len(x.shape))])

    def channel_sums(self, sums):
        """Sums over the samples of what has been summed over the positions, as vectors."""
        return tf.reduce_sum(tf.reshape(sums, (-1, sums.shape[self.axis])), axis=0)


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
    return upstream * z, tape.gradient(z, h, upstream)


def _position_count(x, axis):
    shape = [n for i, n in enumerate(x.shape) if i not in (0, axis)]
    if None in shape:
        dynamic = tf.shape(x)
        return tf.cast(tf.reduce_prod(dynamic) // dynamic[0] // dynamic[axis], x.dtype)
    return tf.reduce_prod(tf.constant([1, *shape], x.dtype))


def _materialize(*tensors):
    """Keeps XLA from computing small tensors anew for each element of a large one that they are broadcast to.

    On CPU it fuses even the error function into loops over whole images. What it does not fuse is a product; this one
    is exact. Compilers for accelerators weigh that by themselves.
    """
    if not is_compiled_by_xla() or reduction_method(tensors[0]) != "matmul":
        return tensors
    half = tf.constant([[0.5, 0.5]], tensors[0].dtype)
    return [tf.reshape(half @ tf.broadcast_to(tf.reshape(x, (1, -1)), (2, tf.size(x))), tf.shape(x)) for x in tensors]
