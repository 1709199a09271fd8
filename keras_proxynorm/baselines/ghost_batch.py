"""Ghost batch normalization, with everything of "Four Things Everyone Should Know to Improve Batch Normalization"."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm.arguments import as_fraction, as_nonnegative, as_positive_integer_or_none, check_divides_channels
from keras_proxynorm.baselines.batch_statistics import Moments, batch_count, channel_moments, merge, mix, normalize
from keras_proxynorm.baselines.moving_statistics import MovingStatisticsLayer, affine_at_inference, share_of_batch
from keras_proxynorm.moments import Tensor

__all__ = ["GhostBatchNormalization", "L2TowardOne"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class GhostBatchNormalization(MovingStatisticsLayer):
    """Batch normalization by the statistics of small parts of the batch, of groups of channels, and of the sample.

    The four things of the paper:

    - *Ghost batches*: in training the statistics are those of `examples_per_group` consecutive samples. Shuffle.
    - *Batch and group normalization in one*: with `channel_groups` they are shared by the channels of a group, too,
      for batches that are too small for statistics of a channel. ``examples_per_group=1`` is group normalization.
    - *Example weighing at inference*: each sample has a weight in its own statistics in training and none at
      inference, where they are the moving averages. `inference_example_weight` gives it one: the raw moments
      ``E[x]`` and ``E[x^2]`` are ``(1 - weight)`` times those of the moving averages and ``weight`` times those of the
      sample. It can be set on a trained model; `choose_inference_example_weight` does, by validation data. The weight
      that a sample has in training is 1 / `examples_per_group`.
    - *Weight decay of gamma and beta*: ``beta_regularizer="l2"`` and ``gamma_regularizer=L2TowardOne(...)``.

    The moving average is one of raw moments over whole batches, so that the variance at inference includes the variance
    between ghost batches. It is kept as a mean and a variance, which mean what those of
    `keras.layers.BatchNormalization` mean.

    Args:
        examples_per_group: Positive integer, how many consecutive samples share their statistics. If it does not
            divide the batch, the last group has those that are left. None for the whole batch. Defaults to 16, a
            choice of this project.
        channel_groups: Integer that divides the number of channels: the number of groups of channels that share their
            statistics. Defaults to None, one for each channel.
        axis: Integer, the channel axis, not 0. Use 1 for ``channels_first`` data. Defaults to -1.
        momentum: Float, the share of the moving averages that stays in each step. Defaults to 0.99.
        epsilon: Float, added to the variance. Defaults to 1e-5.
        inference_example_weight: Float from 0 to 1, the weight of the sample at inference. 1 is instance
            normalization, or, with `channel_groups`, group normalization. Defaults to 0.
        **kwargs: The arguments for `gamma` and `beta` of `keras_proxynorm.GroupNormProxy`; base layer arguments.

    Attributes:
        gamma, beta: Weights of shape ``(channels,)``, or None.
        moving_mean, moving_variance: Weights of shape ``(channels,)``.
        inference_example_weight: Can be set. It takes effect at the next call or tracing: of a model that has predicted
            already, after ``model.compile`` or `choose_inference_example_weight`.

    Call arguments, output and errors are those of `keras_proxynorm.GroupNormProxy`, and `training`: whether to use the
    statistics of the batch and to move the averages, which a frozen layer never does. Masked positions do not
    enter the statistics.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import GhostBatchNormalization, L2TowardOne
    >>> layer = GhostBatchNormalization(8, gamma_regularizer=L2TowardOne(5e-5), beta_regularizer="l2")
    >>> tuple(layer(keras.ops.ones((32, 4, 4, 16)), training=True).shape)
    (32, 4, 4, 16)

    Reference:

    - [Summers and Dinneen, 2020](https://arxiv.org/abs/1906.03548)
    - [Hoffer et al., 2017](https://arxiv.org/abs/1705.08741), ghost batches
    """

    def __init__(
        self,
        examples_per_group: int | None = 16,
        channel_groups: int | None = None,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        *,
        inference_example_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(momentum, epsilon, axis=axis, **kwargs)
        self.examples_per_group = as_positive_integer_or_none("examples_per_group", examples_per_group)
        self.channel_groups = as_positive_integer_or_none("channel_groups", channel_groups)
        # Not by the property: on PyTorch a layer is a Module, and Modules are assigned past properties.
        self._inference_example_weight = as_fraction("inference_example_weight", inference_example_weight)

    @property
    def inference_example_weight(self) -> float:
        """The weight that a sample has in its own statistics at inference."""
        return self._inference_example_weight

    @inference_example_weight.setter
    def inference_example_weight(self, value: float) -> None:
        self._inference_example_weight = as_fraction("inference_example_weight", value)

    def _check_channels(self, input_shape, channels):
        check_divides_channels("channel_groups", self.channel_groups or 1, channels, input_shape)

    def _normalize_batch(self, x, gamma, beta, mask):
        axis = self._channel_axis(x.shape)
        of_channels = channel_moments(x, axis, mask)
        of_batch = merge(of_channels)
        share = share_of_batch(self.momentum, batch_count(x, axis, of_batch))
        # A weighted average of raw moments is the mixture of the two.
        moved = mix(Moments.of_vectors(*self._moving(x.dtype)), of_batch, share)
        self.moving_mean.assign(moved.mean[0])
        self.moving_variance.assign(moved.variance[0])
        moments = merge(of_channels, self.channel_groups, self.examples_per_group)
        return normalize(x, moments, axis, self.epsilon, gamma, beta)

    def _normalize_moving(self, x, gamma, beta, mask):
        moments = merge(Moments.of_vectors(*self._moving(x.dtype)), self.channel_groups)
        axis, weight = self._channel_axis(x.shape), self.inference_example_weight
        if weight:
            of_sample = merge(channel_moments(x, axis, mask), self.channel_groups, samples=1)
            moments = of_sample if weight == 1 else mix(moments, of_sample, weight)
        return normalize(x, moments, axis, self.epsilon, gamma, beta)

    def inference_affine(self) -> tuple[np.ndarray, np.ndarray] | None:
        if self.inference_example_weight:
            return None
        mean, variance = (
            ops.convert_to_numpy(weight).astype("float64") for weight in (self.moving_mean, self.moving_variance)
        )
        groups = self.channel_groups or len(mean)
        mean, variance = mean.reshape(groups, -1), variance.reshape(groups, -1)
        of_groups = mean.mean(axis=1), variance.mean(axis=1) + mean.var(axis=1)
        mean, variance = (np.repeat(vector, mean.shape[1]) for vector in of_groups)
        return affine_at_inference(self, mean, variance, self.epsilon)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "examples_per_group": self.examples_per_group,
            "channel_groups": self.channel_groups,
            "inference_example_weight": self.inference_example_weight,
        }


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class L2TowardOne(keras.regularizers.Regularizer):
    """The penalty ``l2 * sum((x - 1) ** 2)``, for `gamma`, whose neutral value is 1.

    As in `keras.regularizers.L2` there is no factor 1/2: a weight decay of `wd` is ``l2 = wd / 2``. That gamma decays
    toward one is read in the code of the paper's authors, which leaves the coefficient at 0.

    Args:
        l2: Float, not negative.

    Raises:
        ValueError: If `l2` is not such a number.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import L2TowardOne
    >>> float(L2TowardOne(0.5)(keras.ops.array([1.0, 3.0])))
    2.0

    Reference:

    - [Summers and Dinneen, 2020](https://arxiv.org/abs/1906.03548)
    """

    def __init__(self, l2: float = 0.01) -> None:
        self.l2 = as_nonnegative("l2", l2)

    def __call__(self, x: Tensor) -> Tensor:
        return self.l2 * ops.sum(ops.square(x - 1.0))

    def get_config(self) -> dict[str, Any]:
        return {"l2": self.l2}
