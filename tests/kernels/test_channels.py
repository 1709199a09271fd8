"""Shapes of small tensors."""

import numpy as np
import pytest
from backends import numpy, tensors

from keras_proxynorm.kernels import channels


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_groups_are_runs_of_channels(axis):
    shape = [2, 1, 1, 1]
    shape[axis] = 6
    like = np.zeros([n if n > 1 else 5 for n in shape], "float32")
    values = np.arange(12, dtype="float32").reshape(shape)
    by_groups = channels.by_groups(*tensors(values), 3, axis)
    np.testing.assert_array_equal(numpy(by_groups), np.arange(12).reshape(2, 3, 2))
    np.testing.assert_array_equal(numpy(channels.by_channels(by_groups, like, axis)), values)
    repeated = channels.repeat(by_groups[:, :, :1], like, axis)
    np.testing.assert_array_equal(numpy(repeated), (np.arange(12) // 2 * 2).reshape(shape))


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_vectors_lie_along_the_channels(axis):
    vector, like = np.arange(6, dtype="float32"), np.zeros((6, 6, 6, 6), "float32")
    found = numpy(channels.broadcast(*tensors(vector), like, axis))
    np.testing.assert_array_equal(found + like, np.moveaxis(like + vector, -1, axis))
    np.testing.assert_array_equal(numpy(channels.by_groups(*tensors(vector), 3, axis)), vector.reshape(1, 3, 2))
    assert channels.broadcast(None, like, axis) is None and channels.by_groups(None, 3, axis) is None
