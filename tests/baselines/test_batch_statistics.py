"""Moments of samples and channels, merged and mixed, against those of the values themselves."""

import numpy as np
import pytest
from backends import numpy, tensors
from hypothesis import given, settings, strategies

from keras_proxynorm.baselines.batch_statistics import Moments, channel_moments, merge, mix, unbiased


@settings(deadline=None, max_examples=25)
@given(
    samples=strategies.integers(1, 9),
    examples=strategies.integers(1, 9) | strategies.none(),
    groups=strategies.sampled_from([None, 1, 2, 3, 6]),
    offset=strategies.sampled_from([0.0, 1e4]),
    seed=strategies.integers(0, 2**16),
)
def test_merged_moments_are_those_of_the_block(samples, examples, groups, offset, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((samples, 4, 3, 6)) * rng.uniform(0.1, 9, (samples, 1, 1, 6)) + offset).astype("float32")
    moments = merge(channel_moments(*tensors(x), 3), groups, examples)
    pivot, distance, variance = (numpy(moment).astype("float64") for moment in moments[:3])
    x = x.astype("float64")
    per_group = 6 // (groups or 6)
    for sample in range(samples if examples else 1):
        start = sample - sample % examples if examples else 0
        for channel in range(6):
            first = channel - channel % per_group
            block = x[start : start + (examples or samples), ..., first : first + per_group]
            # Large means lose nothing: the distance to the pivot is small.
            np.testing.assert_allclose((pivot + distance)[sample, channel], block.mean(), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(variance[sample, channel], block.var(), rtol=1e-4)


def test_a_mixture_has_weighted_raw_moments():
    rng = np.random.default_rng(0)
    (m1, m2), (v1, v2) = rng.standard_normal((2, 5)), rng.uniform(0.1, 2, (2, 5))
    first, second = (Moments.of_vectors(*tensors(m, v, dtype="float32")) for m, v in ((m1, v1), (m2, v2)))
    for weight in (0.0, 0.3, 1.0):
        mixed = mix(first, second, weight)
        mean = (1 - weight) * m1 + weight * m2
        square = (1 - weight) * (v1 + m1**2) + weight * (v2 + m2**2)
        np.testing.assert_allclose(numpy(mixed.mean)[0], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(numpy(mixed.variance)[0], square - mean**2, rtol=1e-5)


@pytest.mark.parametrize("count, factor", [(1, 1), (2, 2), (5, 1.25)])
def test_unbiased(count, factor):
    (variance,) = tensors(np.ones(3, "float32"))
    np.testing.assert_allclose(numpy(unbiased(variance, count)), factor)
