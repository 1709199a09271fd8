"""Cross-iteration batch normalization: statistics over the last few batches, corrected for the kernel's changes."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm.arguments import (
    as_choice,
    as_epsilon,
    as_fraction,
    as_nonnegative,
    as_nonnegative_integer,
    as_positive_integer,
)
from keras_proxynorm.baselines.batch_statistics import Moments, batch_count, channel_moments, merge, normalize, unbiased
from keras_proxynorm.baselines.kernel_normalization import KernelNormalization
from keras_proxynorm.baselines.moving_statistics import add_moving, affine_at_inference, move
from keras_proxynorm.baselines.patches import moment_derivatives
from keras_proxynorm.kernels.channels import broadcast
from keras_proxynorm.layers.base import Shape
from keras_proxynorm.moments import computation_dtype

__all__ = ["CrossIterationBatchNormalization"]

_INVALID = ("clamp", "drop")


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class CrossIterationBatchNormalization(KernelNormalization):
    """Batch normalization over the batches of the last few iterations (CBN), which wraps the preceding linear layer.

    A small batch has noisy statistics, and those of earlier batches are of an earlier kernel. A Taylor polynomial of
    first order corrects them for what has changed in the kernel since. With mean ``m_i`` and variance ``v_i`` of a
    channel of the output of the linear layer, ``i`` iterations ago, when its kernel was ``W_i``,

        m'_i = m_i + <dm_i/dW, W_0 - W_i>
        v'_i = v_i + <dv_i/dW, W_0 - W_i> - <dm_i/dW, W_0 - W_i>^2
        m = mean_i m'_i
        v = mean_i max(v'_i, 0) + variance_i m'_i
        z = gamma (x - m) / sqrt(v + epsilon) + beta

    over the iterations ``i = 0, ..., window - 1``, or as many as there have been. That is the formula of the paper,
    which has raw moments ``E[x^2]`` in place of variances. While the kernel does not change, as between the steps
    of accumulated gradients, it is batch normalization over all the batches together. Gradients go through the present
    batch only: what is remembered is constant. Changes in the kernels of earlier layers are not corrected for.

    At inference it is batch normalization with moving averages of the mean and the unbiased variance of single batches.
    In training all variances are biased ones; the authors' code has unbiased ones during `burn_in`.

    Nothing is shared between the replicas of a `tf.distribute` strategy: each has the statistics of its part of the
    batch, and remembers them; a file gets their average, and that of the moving averages.

    Args:
        layer: The linear layer, without bias and activation: a `Dense`, `Conv1D`, `Conv2D`, `Conv3D`,
            `DepthwiseConv1D` or `DepthwiseConv2D` of `keras.layers`.
        window: Positive integer, the number of iterations whose statistics are averaged, the present one included. The
            paper has ``min(ceil(16 / batch size), 8)``, for the batch size of a device; 1 is batch normalization.
            Defaults to 4.
        burn_in: Integer, the number of training calls at the start that are plain batch normalization and not
            remembered, while kernels change fast. The paper has 25 epochs of ImageNet, 3 of COCO. Defaults to 0.
        momentum: Float, the share of the moving averages that stays in each step. Defaults to 0.9.
        epsilon: Float, added to the variance. Defaults to 1e-5.
        compensation: Number or boolean that multiplies the inner products above. With 0 or False nothing is corrected
            ("naive CBN"), and no derivatives are computed and stored. Defaults to 1.
        invalid: What becomes of a negative ``v'_i``. ``"clamp"``, as in the paper: it is 0. ``"drop"``, as in the
            authors' code: this iteration does not enter the averages of this channel. Defaults to ``"clamp"``.
        **kwargs: The arguments for `gamma` and `beta` of `keras_proxynorm.GroupNormProxy`; base layer arguments.

    Attributes:
        gamma, beta: Weights of shape ``(channels,)``, or None.
        moving_mean, moving_variance: Weights of shape ``(channels,)``.
        iterations: Integer weight, the number of training calls so far.

    Call arguments:
        inputs: Float tensor, as for the wrapped layer; sizes other than that of the channel axis may be unknown.
        training: Whether to use the statistics of the batches and to remember them. A frozen layer does not.

    Output:
        A tensor as of the wrapped layer, in the layer's compute dtype, with the mask that the wrapped layer passes on.
        Statistics are float32 at least.

    State and cost:
        The last ``window - 1`` iterations are non-trainable weights, saved with the others, so that training goes on
        where it stopped. They are as large as ``window - 1`` copies of the kernel, which hold ``dv/dW``, and vectors;
        for depthwise kernels, ``dm/dW`` is as large. ``W_i`` itself is not needed, since ``<dm_i/dW, W_i>`` and
        ``<dv_i/dW, W_i>`` are. A training call computes one more gradient of the kernel and reads and writes that
        memory once; the backward pass is that of batch normalization. Inference costs nothing more.

    Raises:
        ValueError: For bad arguments when the layer is made; for integer inputs when it is called.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import CrossIterationBatchNormalization
    >>> convolution = keras.layers.Conv2D(16, 3, use_bias=False)
    >>> layer = CrossIterationBatchNormalization(convolution, window=8)
    >>> tuple(layer(keras.ops.ones((2, 8, 8, 3)), training=True).shape)
    (2, 6, 6, 16)

    Reference:

    - [Yao et al., 2020](https://arxiv.org/abs/2002.05712)
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        window: int = 4,
        burn_in: int = 0,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        *,
        compensation: float | bool = 1.0,
        invalid: str = "clamp",
        **kwargs: Any,
    ) -> None:
        super().__init__(layer, **kwargs)
        self.window = as_positive_integer("window", window)
        self.burn_in = as_nonnegative_integer("burn_in", burn_in)
        self.momentum = as_fraction("momentum", momentum)
        self.epsilon = as_epsilon("epsilon", epsilon)
        # True is 1.
        compensation = float(compensation) if isinstance(compensation, bool) else compensation
        self.compensation = as_nonnegative("compensation", compensation)
        self.invalid = as_choice("invalid", invalid, _INVALID)
        self.moving_mean: Any = None
        self.moving_variance: Any = None
        self.iterations: Any = None
        self._history: list[keras.Variable] = []

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        kernel = self.layer.kernel
        self._groups = kernel.shape[-2] if self.is_depthwise else getattr(self.layer, "groups", 1)
        self.moving_mean = add_moving(self, "moving_mean", self.channels, "zeros")
        self.moving_variance = add_moving(self, "moving_variance", self.channels, "ones")
        self.iterations = self.add_weight(
            shape=(), name="iterations", dtype="int32", trainable=False, aggregation="only_first_replica"
        )
        if self.window == 1:
            return
        shapes: dict[str, tuple[int, ...]] = {"past_moments": (2, self.channels)}
        if self.compensation:
            fan_in = math.prod(kernel.shape) // self.channels
            shapes["past_products"] = (2, self.channels)
            shapes["past_mean_derivatives"] = (fan_in, self._groups, 1)
            shapes["past_variance_derivatives"] = (fan_in, self._groups, self.channels // self._groups)
        # Variables of their own making, because `add_weight` cannot leave out the synchronization.
        self._history = [
            keras.Variable(
                "zeros",
                shape=(self.window - 1, *shape),
                dtype=computation_dtype(kernel.dtype, self.variable_dtype),
                trainable=False,
                autocast=False,
                aggregation="mean",
                synchronization="on_read",
                name=name,
            )
            for name, shape in shapes.items()
        ]

    def _normalize(self, inputs, kernel, dtype, training):
        x = ops.cast(self.layer(inputs), dtype)
        if training:
            moments = Moments(*self._moments_in_training(ops.cast(inputs, dtype), x, kernel))
        else:
            mean, variance = (ops.cast(weight, dtype) for weight in (self.moving_mean, self.moving_variance))
            moments = Moments.of_vectors(mean, variance)
        return normalize(x, moments, self.axis % len(x.shape), self.epsilon, *self._affine(dtype))

    def _moments_in_training(self, inputs, x, kernel):
        """Pivot, distance and variance of the window, as vectors, with the state moved on by an iteration."""
        axis = self.axis % len(x.shape)
        moments = merge(channel_moments(x, axis))
        pivot, distance, variance = (moment[0] for moment in moments[:3])
        mean, count = pivot + distance, batch_count(x, axis, moments)
        move(self.moving_mean, mean, self.momentum, count)
        move(self.moving_variance, unbiased(variance, count), self.momentum, count)
        if self.window > 1:
            kernel = ops.stop_gradient(ops.reshape(kernel, (-1, self._groups, self.channels // self._groups)))
            centered = x - broadcast(pivot, x, axis) - broadcast(distance, x, axis)
            present = ops.stack([mean, variance])
            past_means, past_variances = self._past_moments(kernel)
            distance, variance = self._average(past_means - pivot, past_variances, distance, variance)
            # Last, because on PyTorch what has been read from a weight changes with it.
            self._remember(present, inputs, centered, kernel, count > 0)
        self.iterations.assign(self.iterations + ops.cast(count > 0, "int32"))
        return pivot, distance, variance

    def _past_moments(self, kernel):
        """Means and variances of past iterations, had they had the present kernel, ``(window - 1, channels)``."""
        moments, *derived = map(ops.convert_to_tensor, self._history)
        if not self.compensation:
            return moments[:, 0], moments[:, 1]
        products, *derivatives = derived
        changes = self.compensation * (self._products(derivatives, kernel) - products)
        moments = moments + changes
        return moments[:, 0], moments[:, 1] - ops.square(changes[:, 0])

    def _products(self, derivatives, kernel):
        """Inner products for each channel with the derivatives of mean and variance: ``(iterations, 2, channels)``."""
        products = (ops.sum(derivative * kernel, axis=1) for derivative in derivatives)
        return ops.stack([ops.reshape(product, (-1, self.channels)) for product in products], axis=1)

    def _remember(self, moments, inputs, centered, kernel, is_any):
        present = [ops.expand_dims(moments, 0)]
        if self.compensation:
            inputs, centered = (ops.stop_gradient(ops.moveaxis(tensor, self.axis, -1)) for tensor in (inputs, centered))
            names = ("kernel_size", "strides", "dilation_rate", "padding")
            geometry = {name: getattr(self.layer, name) for name in names if hasattr(self.layer, name)}
            both = moment_derivatives(inputs, centered, self._groups, **geometry)
            derivatives = [ops.expand_dims(derivative, 0) for derivative in both]
            present += [self._products(derivatives, kernel), *derivatives]
        for weight, value in zip(self._history, present, strict=True):
            past = ops.convert_to_tensor(weight)
            weight.assign(ops.where(is_any, ops.concatenate([ops.stop_gradient(value), past[:-1]]), past))

    def _average(self, past_distances, past_variances, distance, variance):
        # The youngest come first. What is older than the end of `burn_in` is there, and has the weight 0.
        is_used = ops.expand_dims(ops.arange(self.window - 1) < self.iterations - self.burn_in, 1)
        if self.invalid == "drop":
            is_used = ops.logical_and(is_used, past_variances >= 0)

        def with_present(past, present):
            # Replaced, because infinity times 0 would be NaN.
            past = ops.where(is_used, past, ops.zeros_like(past))
            return ops.concatenate([ops.expand_dims(present, 0), past])

        is_used = ops.broadcast_to(is_used, past_distances.shape)
        weights = with_present(ops.ones_like(past_distances), ops.ones_like(distance))
        weights = weights / ops.sum(weights, axis=0)
        distances = with_present(past_distances, distance)
        variances = with_present(ops.relu(past_variances), variance)
        distance = ops.sum(weights * distances, axis=0)
        return distance, ops.sum(weights * (variances + ops.square(distances - distance)), axis=0)

    def inference_linear(self) -> tuple[np.ndarray, np.ndarray, Any]:
        scale, offset = affine_at_inference(self, self.moving_mean, self.moving_variance, self.epsilon)
        kernel = ops.convert_to_numpy(self.layer.kernel).astype("float64")
        return (kernel.reshape(-1, self.channels) * scale).reshape(kernel.shape), offset, None

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "window": self.window,
            "burn_in": self.burn_in,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "compensation": self.compensation,
            "invalid": self.invalid,
        }
