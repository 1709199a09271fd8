"""Batch group normalization: statistics over the batch and over groups of features."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.arguments import argument_error, as_boolean, as_positive_integer
from keras_proxynorm.baselines.batch_statistics import Moments, batch_count, channel_moments, merge, normalize
from keras_proxynorm.baselines.moving_statistics import MovingStatisticsLayer, affine_at_inference
from keras_proxynorm.kernels.channels import broadcast
from keras_proxynorm.kernels.statistics import expand_mask
from keras_proxynorm.layers.base import Shape

__all__ = ["BatchGroupNormalization"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class BatchGroupNormalization(MovingStatisticsLayer):
    """Batch normalization whose statistics are shared by groups of features (BGN).

    The features of a sample, in the order channel, height, width, are cut into `groups` equal parts. Each part has
    one mean and one variance, over the part and over the batch; `gamma` and `beta` are those of the channel. With as
    many groups as channels that is batch normalization; with fewer it needs fewer samples, and on a batch of one it is
    group normalization; with more, a group is part of a channel's map, and the size of the map must not change.

    The number of groups is to suit the batch size of a device: the smaller the batch, the fewer groups.

    Args:
        groups: Positive integer, the number of groups. It must divide the number of channels, or, if it does not, the
            number of features, the sizes of which must then be known. Defaults to 32.
        axis: Integer, the channel axis, not 0. Use 1 for ``channels_first`` data. Defaults to -1.
        momentum: Float, the share of the moving averages that stays in each step. Defaults to 0.9.
        epsilon: Float, added to the variance. Defaults to 1e-5.
        use_moving_statistics: If True, inference normalizes by the moving averages of the groups' statistics, as batch
            normalization does. If False, by those of the batch at hand. The authors' choice is not known; a
            third-party implementation has no averages. Defaults to True.
        **kwargs: The arguments for `gamma` and `beta` of `keras_proxynorm.GroupNormProxy`; base layer arguments.

    Attributes:
        gamma, beta: Weights of shape ``(channels,)``, or None.
        moving_mean, moving_variance: Weights of shape ``(groups,)``.

    Call arguments, output and errors are those of `keras_proxynorm.GroupNormProxy`, and `training`: whether to use the
    statistics of the batch and to move the averages, which a frozen layer never does. Masked positions do not
    enter the statistics.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import BatchGroupNormalization
    >>> layer = BatchGroupNormalization(groups=4)
    >>> tuple(layer(keras.ops.ones((2, 4, 4, 16)), training=True).shape)
    (2, 4, 4, 16)

    Reference:

    - [Zhou et al., 2020](https://arxiv.org/abs/2012.02782)
    """

    def __init__(
        self,
        groups: int = 32,
        axis: int = -1,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        *,
        use_moving_statistics: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(momentum, epsilon, axis=axis, **kwargs)
        self.groups = as_positive_integer("groups", groups)
        self.use_moving_statistics = as_boolean("use_moving_statistics", use_moving_statistics)

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        if not self._groups_channels(input_shape):
            # The statistics of a part of a map mean something for a map of this size.
            sizes = dict(enumerate(input_shape[1:], 1))
            self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes=sizes)

    def _groups_channels(self, shape):
        return self._channels(shape) % self.groups == 0

    def _statistics_size(self, input_shape):
        return self.groups

    def _check_channels(self, input_shape, channels):
        if self._groups_channels(input_shape):
            return
        expected = f"a divisor of the number of channels, {channels}"
        if None in input_shape[1:]:
            expected += ", where other sizes of the inputs are unknown"
        elif math.prod(input_shape[1:]) % self.groups:
            expected += f", or of that of features, {math.prod(input_shape[1:])}"
        else:
            return
        raise argument_error("groups", self.groups, expected, f"inputs.shape={tuple(input_shape)}")

    def _normalize_batch(self, x, gamma, beta, mask):
        moments = self._batch_moments(x, mask)
        self._move(moments.mean[0], moments.variance[0], batch_count(x, self._channel_axis(x.shape), moments))
        return self._normalize(x, moments, gamma, beta)

    def _normalize_moving(self, x, gamma, beta, mask):
        if self.use_moving_statistics:
            return self._normalize(x, Moments.of_vectors(*self._moving(x.dtype)), gamma, beta)
        return self._normalize(x, self._batch_moments(x, mask), gamma, beta)

    def inference_affine(self) -> tuple[np.ndarray, np.ndarray] | None:
        channels = self.input_spec.axes[self.axis % self.input_spec.ndim]
        if not self.use_moving_statistics or channels % self.groups:
            return None
        mean, variance = (
            np.repeat(ops.convert_to_numpy(weight), channels // self.groups)
            for weight in (self.moving_mean, self.moving_variance)
        )
        return affine_at_inference(self, mean, variance, self.epsilon)

    def _batch_moments(self, x, mask):
        """The moments of each group, of shape ``(1, groups)``."""
        axis = self._channel_axis(x.shape)
        if not self._groups_channels(x.shape):
            if mask is not None:
                mask = self._by_features(ops.logical_and(expand_mask(mask, x, axis), ops.ones_like(x, dtype="bool")))
            return merge(channel_moments(self._by_features(x), 1, mask))
        of_channels = merge(channel_moments(x, axis, mask), self.groups)
        one_of_each = slice(None, None, x.shape[axis] // self.groups)
        return Moments(*(None if tensor is None else tensor[:, one_of_each] for tensor in of_channels))

    def _normalize(self, x, moments, gamma, beta):
        axis = self._channel_axis(x.shape)
        if self._groups_channels(x.shape):
            # Group statistics for each channel, and no copy of the input in another layout.
            moments = Moments(*(ops.repeat(moment, x.shape[axis] // self.groups, axis=1) for moment in moments[:3]))
            return normalize(x, moments, axis, self.epsilon, gamma, beta)
        parts = normalize(self._by_features(x), moments, 1, self.epsilon)
        order = self._channels_first(x)
        y = ops.reshape(parts, (-1, *(x.shape[i] for i in order[1:])))
        y = ops.transpose(y, [order.index(i) for i in range(len(order))])
        return kernels.affine(y, broadcast(gamma, y, axis), broadcast(beta, y, axis))

    def _by_features(self, x):
        """The inputs as ``(batch, groups, features of a group)``, features in the order channel, height, width."""
        features = math.prod(x.shape[1:])
        return ops.reshape(ops.transpose(x, self._channels_first(x)), (-1, self.groups, features // self.groups))

    def _channels_first(self, x):
        """The order of axes with the channels after the batch."""
        axis = self._channel_axis(x.shape)
        # Not ops.moveaxis, which PyTorch cannot vectorize.
        return [0, axis, *(i for i in range(1, len(x.shape)) if i != axis)]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "groups": self.groups, "use_moving_statistics": self.use_moving_statistics}
