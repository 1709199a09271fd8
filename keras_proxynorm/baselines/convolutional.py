"""Convolutional normalization: convolutions whose every filter has the same gain at each frequency."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm.arguments import as_boolean, as_epsilon, as_fraction
from keras_proxynorm.baselines.frequencies import filter_frequencies, kernel_power
from keras_proxynorm.baselines.kernel_normalization import KernelNormalization
from keras_proxynorm.layers.base import InitializerLike, Shape

__all__ = ["ConvolutionalNormalization"]

_FADING_STEPS, _LEAST_SHARE = 40_000, 0.01
# Of a whole filter: one of zeros stays one, with finite gradients.
_LEAST_POWER = 1e-8


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class ConvolutionalNormalization(KernelNormalization):
    """A convolution that is normalized by the spectrum of its own filters (ConvNorm).

    The output of a convolution at all positions that its kernel touches, ``n + k - 1``, is divided, frequency by
    frequency, by the gain of its filter: with the Fourier transform ``K`` of the kernel, padded with zeros to that
    size,

        V_c(f) = (sum_j |K_cj(f)|^2) ^ -1/2

    for the filter ``c`` and input channels ``j``, so that each filter becomes an isometry, with the same gain at every
    frequency. Cropping and strides follow, and then, in place of `gamma`, a depthwise convolution with a kernel of the
    size of the convolution's, and `beta`. Nothing depends on data. Gradients go through the convolution and not through
    ``V``. For a kernel of size 1 it is a division by the length of each filter.

    Where a filter has no gain, as an edge filter at frequency 0, only rounding errors could be amplified;
    `kernel_epsilon` limits that. The transforms are products with matrices of cosines and sines. Their cost grows with
    the size of the image, and strides save nothing: a step takes several times as long as with batch normalization.

    Args:
        layer: The convolution, without bias and activation: a `Conv1D` or `Conv2D` of `keras.layers` without dilation.
        momentum: Float, of the following batch normalization. Defaults to 0.9.
        epsilon: Float, of the following batch normalization. Defaults to 1e-5.
        batch_normalization: If True, a batch normalization comes at the end, as an option of the authors' code, with
            `gamma` and `beta` as `scale` and `center` say. Defaults to False.
        kernel_epsilon: Float, the least power that a frequency counts with, relative to the mean over all frequencies;
            the authors' code has none. Defaults to 1e-4, so that no gain grows by more than 100 times.
        depthwise_initializer: Initializer of `depthwise_kernel`. Defaults to None, a kernel that changes nothing; the
            authors' code has the uniform one of convolutions, as ``"he_uniform"``.
        moving_spectrum: If True, inference takes a moving average of ``V`` as in the authors' code, so that images must
            have one known size. If False, ``V`` is that of the kernel as it is. Defaults to False.
        spectrum_momentum: Float, the share of the moving ``V`` that stays in each step. Defaults to None, the authors'
            schedule, by which it grows from 0 to 0.99 over 40000 steps.
        **kwargs: The arguments for `beta` of `keras_proxynorm.GroupNormProxy`; `scale`, whether there is a depthwise
            convolution, whose regularizer and constraint are those of `gamma`, and the center of whose kernel starts as
            `gamma_initializer` says; base layer arguments.

    Attributes:
        layer: The convolution.
        depthwise_kernel: Weight of shape ``(*kernel_size, channels, 1)``, or None.
        beta: Weight of shape ``(channels,)``, or None.
        norm: The `keras.layers.BatchNormalization` at the end, or None.
        moving_inverse_gain: Non-trainable weight, the moving average of ``V``, of shape ``(*frequencies, channels)``,
            ones at first, where the authors' code has zeros; or None.
        iterations: Non-trainable integer weight, the number of its updates; or None.

    Call arguments:
        inputs: Float tensor, as for the convolution; sizes other than that of the channel axis may be unknown.

    Output:
        A tensor of the shape of the output of the convolution, in the layer's compute dtype. Spectra are float32 at
        least.

    Raises:
        ValueError: For bad arguments; for unknown sizes with `moving_spectrum`; for integer inputs when it is called.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import ConvolutionalNormalization
    >>> layer = ConvolutionalNormalization(keras.layers.Conv2D(16, 3, padding="same", use_bias=False))
    >>> tuple(layer(keras.ops.ones((2, 8, 8, 3))).shape)
    (2, 8, 8, 16)

    Reference:

    - [Liu et al., 2021](https://arxiv.org/abs/2103.00673)
    """

    kinds = ("Conv1D", "Conv2D")

    def __init__(
        self,
        layer: keras.layers.Layer,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        *,
        batch_normalization: bool = False,
        kernel_epsilon: float = 1e-4,
        depthwise_initializer: InitializerLike | None = None,
        moving_spectrum: bool = False,
        spectrum_momentum: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer, **kwargs)
        self.momentum = as_fraction("momentum", momentum)
        self.epsilon = as_epsilon("epsilon", epsilon)
        self.batch_normalization = as_boolean("batch_normalization", batch_normalization)
        self.kernel_epsilon = as_epsilon("kernel_epsilon", kernel_epsilon)
        self.depthwise_initializer = keras.initializers.get(depthwise_initializer)
        self.moving_spectrum = as_boolean("moving_spectrum", moving_spectrum)
        self.spectrum_momentum = (
            None if spectrum_momentum is None else as_fraction("spectrum_momentum", spectrum_momentum)
        )
        self.depthwise_kernel: Any = None
        self.moving_inverse_gain: Any = None
        self.iterations: Any = None
        self.norm: Any = None
        if self.batch_normalization:
            of_affine = {
                f"{weight}_{kind}": getattr(self, f"{weight}_{kind}")
                for weight in ("beta", "gamma")
                for kind in ("initializer", "regularizer", "constraint")
            }
            self.norm = keras.layers.BatchNormalization(
                axis=self.axis,
                momentum=momentum,
                epsilon=epsilon,
                center=self.center,
                scale=self.scale,
                dtype=self.dtype_policy,
                # Its inputs are float32 at least, and may be too large for float16.
                autocast=False,
                **of_affine,
            )

    @classmethod
    def unsupported_because(cls, layer: Any) -> str | None:
        if set(getattr(layer, "dilation_rate", [1])) != {1}:
            return "whose kernel is dilated"
        return super().unsupported_because(layer)

    def _add_affine(self, channels):
        # A depthwise kernel has the place of `gamma`.
        scale, self.scale = self.scale, False
        super()._add_affine(channels)
        self.scale = scale
        if scale:
            self.depthwise_kernel = self.add_weight(
                shape=(*self.layer.kernel_size, channels, 1),
                name="depthwise_kernel",
                initializer=self.depthwise_initializer or self._impulse,
                regularizer=self.gamma_regularizer,
                constraint=self.gamma_constraint,
                autocast=False,
            )

    def _impulse(self, shape, dtype=None):
        """A depthwise kernel that scales each channel and changes nothing else."""
        impulse = np.zeros((*shape[:-2], 1, 1))
        impulse[tuple((size - 1) // 2 for size in shape[:-2])] = 1
        return ops.convert_to_tensor(impulse, dtype=dtype) * self.gamma_initializer(shape[-2:], dtype=dtype)

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        if self.norm is not None:
            self.norm.build(self.layer.compute_output_shape(input_shape))
        if self.moving_spectrum:
            sizes = [input_shape[axis] for axis in self._positions]
            if None in sizes:
                raise ValueError(
                    "With moving_spectrum=True the inputs must have known sizes. "
                    f"Received: inputs.shape={tuple(input_shape)}"
                )
            self.input_spec = keras.layers.InputSpec(shape=(None, *input_shape[1:]))
            first, *others = (n + k - 1 for n, k in zip(sizes, self.layer.kernel_size, strict=True))
            frequencies = [1] * len(sizes) if self._is_pointwise else [first // 2 + 1, *others]
            self.moving_inverse_gain = self.add_weight(
                shape=(*frequencies, self.channels),
                name="moving_inverse_gain",
                initializer="ones",
                trainable=False,
                autocast=False,
                aggregation="mean",
            )
            self.iterations = self.add_weight(
                shape=(), name="iterations", dtype="int32", trainable=False, aggregation="only_first_replica"
            )

    @property
    def _positions(self):
        """The axes of the positions, in the inputs and in the outputs."""
        first = 2 if self.axis == 1 else 1
        return list(range(first, first + len(self.layer.kernel_size)))

    @property
    def _is_pointwise(self):
        return math.prod(self.layer.kernel_size) == 1

    def _normalize(self, inputs, kernel, dtype, training):
        shape = ops.shape(inputs)
        sizes = [shape[axis] + k - 1 for axis, k in zip(self._positions, self.layer.kernel_size, strict=True)]
        # Filters of length 1, for which `kernel_epsilon` is a share, and convolutions in float16 do not overflow.
        inverse_length = self._inverse_length(kernel)
        kernel = kernel * inverse_length
        inverse_gain = self._inverse_gain(kernel, inverse_length, sizes, training)
        if self._is_pointwise:
            outputs = self._linear(inputs, kernel * inverse_gain, dtype)
        else:
            outputs = self._crop(self._filtered(inputs, kernel, inverse_gain, sizes, dtype), shape)
        if self.depthwise_kernel is not None:
            outputs = ops.depthwise_conv(
                outputs,
                ops.cast(self.depthwise_kernel, dtype),
                padding="same",
                data_format=self.layer.data_format,
            )
        outputs = self._plus_beta(outputs)
        return outputs if self.norm is None else self.norm(outputs, training=training)

    def _inverse_length(self, kernel):
        power = ops.sum(ops.square(self._by_filter(kernel)), axis=0)
        return ops.stop_gradient(ops.rsqrt(power + _LEAST_POWER))

    def _inverse_gain(self, kernel, inverse_length, sizes, training):
        """``V``, of shape ``(*frequencies, channels)``, for the kernel, which was multiplied with `inverse_length`."""
        if self.moving_spectrum and not training:
            return ops.cast(self.moving_inverse_gain, kernel.dtype) / inverse_length
        power = ops.sum(ops.square(kernel), axis=-2) if self._is_pointwise else kernel_power(kernel, sizes)
        inverse_gain = ops.stop_gradient(ops.rsqrt(ops.maximum(power, self.kernel_epsilon)))
        if self.moving_spectrum:
            old = ops.cast(self.moving_inverse_gain, kernel.dtype)
            self.moving_inverse_gain.assign(old + self._share() * (inverse_gain * inverse_length - old))
            self.iterations.assign(self.iterations + 1)
        return inverse_gain

    def _share(self):
        """The share of the new ``V`` in the moving one."""
        if self.spectrum_momentum is not None:
            return 1.0 - self.spectrum_momentum
        progress = ops.minimum(ops.cast(self.iterations, "float32") / _FADING_STEPS, 1.0)
        return ops.maximum(0.5 * (ops.cos(math.pi * progress) + 1.0), _LEAST_SHARE)

    def _filtered(self, inputs, kernel, inverse_gain, sizes, dtype):
        """The convolution with all positions that the kernel touches, each frequency divided by the gain."""
        padding = [(0, 0)] * len(inputs.shape)
        for axis, k in zip(self._positions, self.layer.kernel_size, strict=True):
            padding[axis] = (k - 1, k - 1)
        compute_dtype = self.layer.compute_dtype
        outputs = ops.conv(
            ops.pad(ops.cast(inputs, compute_dtype), padding),
            ops.cast(kernel, compute_dtype),
            data_format=self.layer.data_format,
        )
        if outputs.shape[0] == 0:
            # TensorFlow gives the outputs of an empty batch the sizes of the padded inputs.
            ends = dict(zip(self._positions, sizes, strict=True))
            outputs = outputs[tuple(slice(ends.get(axis)) for axis in range(len(outputs.shape)))]
        if self.axis == 1:
            inverse_gain = ops.moveaxis(inverse_gain, -1, 0)
        return filter_frequencies(ops.cast(outputs, dtype), inverse_gain, self._positions)

    def _crop(self, outputs, input_shape):
        """The positions that the convolution has with its padding and strides."""
        window = [slice(None)] * len(input_shape)
        for axis, k, stride in zip(self._positions, self.layer.kernel_size, self.layer.strides, strict=True):
            size = input_shape[axis]
            if self.layer.padding == "valid":
                count, before = (size - k) // stride + 1, 0
            else:
                count = (size + stride - 1) // stride
                total = (count - 1) * stride + k - size
                total = max(total, 0) if isinstance(total, int) else ops.maximum(total, 0)
                before = k - 1 if self.layer.padding == "causal" else total // 2
            start = k - 1 - before
            window[axis] = slice(start, start + (count - 1) * stride + 1, stride)
        return outputs[tuple(window)]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "batch_normalization": self.batch_normalization,
            "kernel_epsilon": self.kernel_epsilon,
            "depthwise_initializer": keras.initializers.serialize(self.depthwise_initializer),
            "moving_spectrum": self.moving_spectrum,
            "spectrum_momentum": self.spectrum_momentum,
        }
