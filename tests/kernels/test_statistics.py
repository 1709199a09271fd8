"""group_moments against NumPy in float64: groups, layouts, masks, offsets."""

import numpy as np
import pytest
from backends import MODES, check_gradients, compiled, gradients, numpy, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_proxynorm import kernels


def group_moments(x, groups, axis, mask=None):
    """Mean and variance, with the two parts of the mean put together."""
    pivot, distance, variance = kernels.group_moments(x, groups, axis, mask)
    return pivot + distance, variance


def expected_moments(x, groups, axis, mask=None):
    """Mean and variance of each group, straight from the definition, broadcast back to its channels."""
    x = np.moveaxis(np.asarray(x, "float64"), axis, -1)
    mask = np.ones(x.shape, bool) if mask is None else np.moveaxis(mask, axis, -1)
    channels = x.shape[-1]
    mean, variance = np.zeros((2, len(x), channels))
    for n in range(len(x)):
        for c in range(channels):
            group = slice(c // (channels // groups) * (channels // groups), None)
            group = slice(group.start, group.start + channels // groups)
            values = x[n, ..., group][mask[n, ..., group]]
            if values.size:
                mean[n, c], variance[n, c] = values.mean(), values.var()
    shape = [1] * x.ndim
    shape[0], shape[axis] = len(x), channels
    return mean.reshape(shape), variance.reshape(shape)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    rank=st.integers(2, 5),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    masked=st.sampled_from(["no", "samples", "steps", "elements"]),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_definition(data, rank, groups, per_group, masked, offset):
    axis = data.draw(st.integers(1, rank - 1))
    shape = [data.draw(st.integers(1, 4)) for _ in range(rank)]
    shape[axis] = groups * per_group
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    x = (offset + rng.standard_normal(shape)).astype("float32")
    mask = full_mask = None
    if masked != "no":
        axes = list(range(rank)) if masked == "elements" else [0, *(i for i in range(1, rank) if i != axis)][:2]
        axes = axes[:1] if masked == "samples" else axes
        mask = rng.random([shape[i] for i in axes]) < 0.6
        full_mask = np.broadcast_to(mask.reshape([shape[i] if i in axes else 1 for i in range(rank)]), shape)
    found = group_moments(*tensors(x), groups, axis, None if mask is None else tensors(mask)[0])
    expected = expected_moments(x, groups, axis, full_mask)
    atol = 1e-5 if offset == 0 else 2e-3  # the input itself is rounded to 5e-4 at 1e4
    np.testing.assert_allclose(numpy(found[0]), expected[0], rtol=1e-6, atol=atol)
    np.testing.assert_allclose(numpy(found[1]), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_large_offset(mode, groups):
    x = (1e4 + np.random.default_rng(0).standard_normal((2, 224, 224, 8))).astype("float32")
    mean, variance = compiled(lambda x: group_moments(x, groups, 3), mode)(*tensors(x))
    expected_mean, expected_variance = expected_moments(x, groups, 3)
    np.testing.assert_allclose(numpy(mean), expected_mean, atol=1e-3)  # a float32 at 1e4 is known to 5e-4
    np.testing.assert_allclose(numpy(variance), expected_variance, rtol=1e-5)


@pytest.mark.parametrize("outliers", [[0], [32], [0, 63]])
def test_pixels_far_out(outliers):
    x = np.random.default_rng(0).standard_normal((1, 64, 64, 4)).astype("float32")
    for i in outliers:
        x[:, i, i] = 1e4
    mean, variance = group_moments(*tensors(x), 2, 3)
    expected_mean, expected_variance = expected_moments(x, 2, 3)
    np.testing.assert_allclose(numpy(mean), expected_mean, atol=1e-6 * np.sqrt(expected_variance.max()))
    # Beside 1e8, float32 sums lose what is small.
    np.testing.assert_allclose(numpy(variance), expected_variance, rtol=1e-4)


@pytest.mark.parametrize("garbage", [1e30, np.inf, np.nan])
def test_masked_positions_may_hold_anything(garbage):
    x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype("float32")
    mask = np.array([[True, True, False, True, False], [False] * 5])
    dirty = np.where(mask[:, :, None], x, garbage).astype("float32")
    for clean_value, dirty_value in zip(
        group_moments(*tensors(x), 2, 2, *tensors(mask)),
        group_moments(*tensors(dirty), 2, 2, *tensors(mask)),
        strict=True,
    ):
        np.testing.assert_array_equal(numpy(clean_value), numpy(dirty_value))
    (gradient,) = gradients(lambda x: sum(ops.sum(v) for v in group_moments(x, 2, 2, *tensors(mask))), *tensors(dirty))
    assert np.all(np.isfinite(numpy(gradient)))
    np.testing.assert_array_equal(numpy(gradient)[~mask], 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_gradients(groups, masked, order):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 2, 4))
    mask = rng.random((2, 3)) < 0.7 if masked else None
    weights = rng.standard_normal((2, 2, 1, 1, 4))

    def scalar(x):
        m = None if mask is None else tensors(mask)[0]
        w_mean, w_variance = tensors(*weights, dtype="float64")
        mean, variance = group_moments(x, groups, 3, m)
        return ops.sum(w_mean * mean * mean * mean) + ops.sum(w_variance * ops.square(variance))

    check_gradients(scalar, x, order=order, rtol=1e-7)


@pytest.mark.parametrize("shape, axis", [((2, 3, 4, 1), 2), ((2, 4), 2), ((2, 3), 1)])
def test_masks_that_do_not_fit(shape, axis):
    with pytest.raises(ValueError, match=r"`mask` must have the shape of the inputs, or .*\(2, 3, 4\), axis="):
        group_moments(*tensors(np.zeros((2, 3, 4), "float32")), 1, axis, *tensors(np.ones(shape, bool)))
