"""Means and variances over samples that arrive in batches, in constant memory."""

import numpy as np

__all__ = ["ChannelPowers", "StreamingMoments"]


class StreamingMoments:
    """Mean and variance of arrays along their first axis, merged batch by batch in float64.

    Reference:

    - Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(())
        self._squares = np.zeros(())

    def update(self, values: np.ndarray) -> None:
        """Adds a batch, an array of shape ``(samples, ...)``."""
        count = self.count + len(values)
        mean = values.mean(axis=0)
        distance = mean - self.mean
        squares = np.square(values - mean).sum(axis=0)
        self._squares = self._squares + squares + np.square(distance) * (self.count * len(values) / count)
        self.mean = self.mean + distance * (len(values) / count)
        self.count = count

    @property
    def variance(self) -> np.ndarray:
        """The variance, divided by the number of samples."""
        return self._squares / self.count


class ChannelPowers:
    """The moments over samples of the mean and the standard deviation that each channel has in a sample."""

    def __init__(self) -> None:
        self._means, self._stddevs = StreamingMoments(), StreamingMoments()

    def update(self, means: np.ndarray, stddevs: np.ndarray) -> None:
        """Adds a batch: arrays of shape ``(samples, channels)``."""
        self._means.update(means)
        self._stddevs.update(stddevs)

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self._means.count

    @property
    def terms(self) -> np.ndarray:
        """The four power terms, averaged over the channels: an array of shape ``(4,)``."""
        means, stddevs = self._means, self._stddevs
        terms = np.square(means.mean), means.variance, np.square(stddevs.mean), stddevs.variance
        return np.array([term.mean() for term in terms])

    @property
    def mean(self) -> np.ndarray:
        """The mean of each channel over samples and positions, shape ``(channels,)``."""
        return self._means.mean

    @property
    def variance(self) -> np.ndarray:
        """The variance of each channel over samples and positions, shape ``(channels,)``."""
        return self._means.variance + self._stddevs.variance + np.square(self._stddevs.mean)
