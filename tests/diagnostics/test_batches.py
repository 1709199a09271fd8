"""What a user may pass as data, and in which batches it comes."""

import itertools

import keras
import numpy as np
import pytest
from backends import BACKEND
from diagnostics.samples import Numbers, lists, normal

from keras_proxynorm.arguments import check_built_model
from keras_proxynorm.diagnostics import LogPowerDecomposition, LogSignalPropagation
from keras_proxynorm.diagnostics.batches import batches

X, Y, W = normal(7, 4), np.arange(7), normal(7, seed=1)


def joined(found, i):
    return np.concatenate([batch[i] for batch in found])


@pytest.mark.parametrize("size, sizes", [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_arrays_are_cut(size, sizes):
    found = lists((X, Y, W), batch_size=size)
    assert [len(x) for x, _, _ in found] == sizes
    for i, array in enumerate((X, Y, W)):
        np.testing.assert_array_equal(joined(found, i), array)


def test_inputs_alone_have_no_targets():
    for data in (X, (X,)):
        ((x, y, w),) = lists(data)
        np.testing.assert_array_equal(x, X)
        assert y is None and w is None


def test_targets_that_are_none():
    """What `keras.Model.fit` takes as y=None or sample_weight=None."""
    ((x, y, w),) = lists((X, Y, None))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    assert w is None


def test_tensors_are_cut():
    found = lists((keras.ops.convert_to_tensor(X), keras.ops.convert_to_tensor(Y)), batch_size=5)
    np.testing.assert_array_equal(joined(found, 0), X)
    np.testing.assert_array_equal(joined(found, 1), Y)


def test_dict_of_inputs():
    found = lists(({"a": X, "b": 2 * X}, Y), batch_size=4)
    assert [sorted(x) for x, _, _ in found] == [["a", "b"]] * 2
    np.testing.assert_array_equal(np.concatenate([x["b"] for x, _, _ in found]), 2 * X)
    ((x, y, _),) = lists({"a": X})
    assert sorted(x) == ["a"] and y is None


def test_list_of_inputs_is_inputs():
    """A list is a structure of inputs, as for `fit`; only a tuple is (inputs, targets)."""
    ((x, y, _),) = lists([X, 2 * X])
    assert y is None and len(x) == 2
    np.testing.assert_array_equal(x[1], 2 * X)
    ((x, y, _),) = lists(([X, 2 * X], Y))
    assert len(x) == 2
    np.testing.assert_array_equal(y, Y)


def test_list_of_four_inputs():
    ((x, y, _),) = lists([X] * 4)
    assert len(x) == 4 and y is None


def test_batches_of_lists_are_inputs_and_targets():
    """As a data loader of PyTorch makes them."""
    ((x, y, _),) = lists(iter([[X, Y]]))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)


def test_generator_is_gone_through_once_and_no_further_than_steps():
    taken = []

    def generate():
        for i in itertools.count():
            taken.append(i)
            yield X + i, Y

    found = lists(generate(), steps=3)
    assert len(found) == 3 and taken == [0, 1, 2]
    np.testing.assert_array_equal(found[2][0], X + 2)


def test_steps_of_arrays():
    assert len(lists(X, batch_size=2, steps=3)) == 3
    assert len(lists(X, batch_size=2, steps=100)) == 4


@pytest.mark.parametrize("unknown", [False, True])
def test_py_dataset(unknown):
    data = Numbers([(X[:3], Y[:3]), (X[3:], Y[3:])], unknown)
    found = lists(data, steps=2)
    np.testing.assert_array_equal(joined(found, 0), X)
    if not unknown:
        assert len(lists(data)) == 2
    else:
        assert len(lists(data, steps=5)) == 5


def test_tf_data():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    np.testing.assert_array_equal(joined(lists(data.batch(3)), 0), X)
    unknown = data.batch(3).filter(lambda x, y: True)
    assert int(unknown.cardinality()) == tf.data.UNKNOWN_CARDINALITY
    np.testing.assert_array_equal(joined(lists(unknown), 1), Y)
    assert len(lists(data.batch(3).repeat(), steps=8)) == 8
    ((x, y, _),) = lists(tf.data.Dataset.from_tensor_slices({"a": X}).batch(7))
    np.testing.assert_array_equal(x["a"], X)
    assert y is None


def test_torch_data_loader():
    torch = pytest.importorskip("torch")
    tensors = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    found = [(np.asarray(x), np.asarray(y)) for x, y, _ in batches(torch.utils.data.DataLoader(tensors, 3), verbose=0)]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in found]), X)
    np.testing.assert_array_equal(np.concatenate([y for _, y in found]), Y)


def test_data_frame():
    pandas = pytest.importorskip("pandas")
    found = [np.asarray(x) for x, _, _ in batches(pandas.DataFrame(X), batch_size=3)]
    np.testing.assert_array_equal(np.concatenate(found), X)


@pytest.mark.parametrize("verbose", [0, 1])
def test_progress_bar(verbose, capsys):
    lists(X, batch_size=2, verbose=verbose)
    printed = capsys.readouterr().out
    assert ("4/4" in printed) == bool(verbose)
    if not verbose:
        assert not printed
    lists(iter([(X,), (X,)]), verbose=verbose)
    assert ("2/" in capsys.readouterr().out) == bool(verbose)


@pytest.mark.parametrize("name", ["batch_size", "steps"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_bad_counts(name, value):
    with pytest.raises(ValueError, match=f"Argument `{name}` must be a positive integer.*Received: {name}={value!r}"):
        batches(X, **{name: value})


def test_batch_size_none():
    with pytest.raises(ValueError, match="`batch_size` must be a positive integer. Received: batch_size=None"):
        batches(X, batch_size=None)


@pytest.mark.parametrize("name", ["batch_size", "steps"])
def test_integers_of_numpy_are_integers(name):
    """As everywhere else in this package."""
    assert len(lists(X, **{"batch_size": 2, name: np.int64(2)})) in (2, 4)


@pytest.mark.parametrize("data", ["text", b"bytes", 3, None, {"a": 3}])
def test_bad_data(data):
    with pytest.raises(ValueError, match="Argument `data` must be .*Received: data of the type"):
        batches(data)


@pytest.mark.parametrize("data", [(X, Y[:3]), X[:0], np.float32(3), ({"a": X}, Y[:1])])
def test_arrays_that_do_not_go_together(data):
    with pytest.raises(ValueError, match="Argument `data` must have arrays with the same number of samples"):
        batches(data)


def test_no_batch():
    for data in (iter(()), [], Numbers([])):
        with pytest.raises(ValueError, match="Argument `data` must have at least one batch"):
            lists(data)


def test_model_that_is_none_or_not_built():
    for model in (None, keras.layers.Dense(3), "model"):
        with pytest.raises(ValueError, match="Argument `model` must be a keras.Model. Received: model="):
            check_built_model(model)
    with pytest.raises(ValueError, match="Argument `model` must be built"):
        check_built_model(keras.Sequential([keras.layers.Dense(3)]))


@pytest.mark.skipif(BACKEND == "tensorflow", reason="about tensors of TensorFlow elsewhere")
def test_batches_of_tensorflow_become_arrays():
    tf = pytest.importorskip("tensorflow")
    for x, y, _ in batches((tf.constant(X), tf.constant(Y)), batch_size=4):
        assert isinstance(x, np.ndarray) and isinstance(y, np.ndarray)


def test_list_of_tuples_is_a_dataset():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    received = list(batches([(x[:4], y[:4]), (x[4:], y[4:])], batch_size=1))
    assert [len(inputs) for inputs, _, _ in received] == [4, 2]


class Endless(keras.utils.PyDataset):
    @property
    def num_batches(self):
        return None

    def __getitem__(self, index):
        return X, Y


def repeated_dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(3).repeat()


@pytest.mark.parametrize("make", [Endless, repeated_dataset, lambda: itertools.cycle([(X, Y)])])
def test_endless_data_needs_steps(make):
    with pytest.raises(
        ValueError, match="`steps` must be a positive integer.*never ends. Received: steps=None, data of"
    ):
        batches(make())
    assert len(list(batches(make(), steps=5))) == 5
    for callback in (LogPowerDecomposition, LogSignalPropagation):
        with pytest.raises(ValueError, match="`steps`|`data` must be data that can be iterated repeatedly"):
            callback(make())
