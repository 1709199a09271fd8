"""Hooks on calls of layers: who observes what, from several threads at once, and what is left behind."""

import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from diagnostics.samples import L, all_state, images, normal, small, unchanged

from keras_proxynorm.diagnostics import power_decomposition
from keras_proxynorm.observation.calls import _Hook, _observers, check_batch, observed


class MeetingPoint(L.Layer):
    """Waits, in threads that are `at` it, until so many of them are here at once."""

    def __init__(self, at, parties):
        super().__init__()
        self.at, self.barrier = at, threading.Barrier(parties, timeout=60)

    def call(self, x):
        if threading.current_thread() in self.at:
            self.barrier.wait()
        return x


def with_meeting_point(parties):
    inputs = keras.Input((6, 6, 3))
    at: list = []
    x = L.Conv2D(4, 3, name="conv")(MeetingPoint(at, parties)(inputs))
    return keras.Model(inputs, L.ReLU(name="relu")(x)), at


def doubled(seen):
    def observe(name, layer, call, args, kwargs):
        seen.append(name)
        return 2 * call(*args, **kwargs)

    return observe


def test_two_threads_observe_the_same_model_while_a_third_predicts():
    model, at = with_meeting_point(parties=3)
    x = normal(2, 6, 6, 3)
    expected = keras.ops.convert_to_numpy(model(x))

    def run(names):
        at.append(threading.current_thread())
        seen: list[str] = []
        with observed({name: model.get_layer(name) for name in names}, doubled(seen)):
            # All three are inside the model at once, and the hooks of both observers are in place.
            y = keras.ops.convert_to_numpy(model(x))
        return y, seen

    with ThreadPoolExecutor(3) as pool, unchanged(model):
        both, one, none = pool.map(run, (["conv", "relu"], ["relu"], []))
    np.testing.assert_array_equal(both[0], 4 * expected)
    np.testing.assert_array_equal(one[0], 2 * expected)
    np.testing.assert_array_equal(none[0], expected)
    assert (both[1], one[1], none[1]) == (["conv", "relu"], ["relu"], [])


def test_the_first_to_leave_does_not_take_the_hook_of_the_other():
    model = small()
    relu, x = model.get_layer("relu"), images()[0]
    seen: list[str] = []
    entered, leave = threading.Event(), threading.Event()

    def first():
        with observed({"first": relu}, doubled([])):
            entered.set()
            assert leave.wait(60)

    with unchanged(model, x), ThreadPoolExecutor(1) as pool:
        left = pool.submit(first)
        assert entered.wait(60)
        with observed({"second": relu}, doubled(seen)):
            leave.set()
            left.result()
            model(x)
    assert seen == ["second"]


def test_diagnostics_in_threads_are_those_of_each_alone():
    model = small()
    data = [images(seed=i)[0] for i in range(4)]
    alone = [power_decomposition(model, x, verbose=0).powers for x in data]
    with ThreadPoolExecutor(4) as pool, unchanged(model, data[0]):
        together = list(pool.map(lambda x: power_decomposition(model, x, verbose=0).powers, data))
        predictions = list(pool.map(lambda x: keras.ops.convert_to_numpy(model(x, training=False)), data))
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(predictions, [keras.ops.convert_to_numpy(model(x, training=False)) for x in data])


def test_observers_nest():
    model = small()
    relu, x = model.get_layer("relu"), images()[0]
    seen: list[str] = []

    def observe(name, layer, call, args, kwargs):
        seen.append(name)
        return call(*args, **kwargs)

    with observed({"outer": relu}, observe), observed({"inner": relu}, observe):
        model(x)
    assert seen == ["inner", "outer"] and "call" not in vars(relu)


def test_data_that_use_the_model_are_not_observed():
    """A generator may run the model whose diagnosis it feeds."""
    model = small()
    x = images()[0]

    def data():
        for _ in range(2):
            yield x + 0 * float(keras.ops.sum(model(x)))

    powers = power_decomposition(model, data(), verbose=0).powers
    np.testing.assert_allclose(powers, power_decomposition(model, np.concatenate([x, x]), verbose=0).powers)


class Failing(L.Layer):
    def call(self, x):
        raise KeyError("of the user")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda x: x[:0], "no samples"),
        (lambda x: x[..., :2], r"shape \(10, 6, 6, 2\), with which the model 'm' does not run"),
        (lambda x: 3.0, "Received: 3.0, with which"),
        (lambda x: "images", "Received: images, with which"),
    ],
)
def test_what_is_no_batch_is_named(batch, message):
    with pytest.raises(ValueError, match=f"Argument `images` must be a batch of inputs.*{message}"):
        check_batch("images", small(), batch(images()[0]))


def test_a_layer_that_raises_is_the_error_of_the_batch():
    model = keras.Sequential([keras.Input((3,)), L.Dense(2)])
    model.add(L.Identity(name="last"))
    failing = Failing()
    object.__setattr__(model.get_layer("last"), "call", failing.call)
    with pytest.raises(ValueError, match="Argument `data` must be a batch.*of the user") as error:
        check_batch("data", model, normal(2, 3))
    assert isinstance(error.value.__cause__, KeyError)


def test_a_batch_that_runs_leaves_the_model_as_it_was():
    model = small()
    before = all_state(model)
    check_batch("data", model, images()[0])
    for a, b in zip(before, all_state(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_fault_of_this_package_is_not_blamed_on_the_batch():
    model = keras.Sequential([keras.Input((3,)), L.Dense(2, name="dense")])
    hook = _Hook(model.get_layer("dense"))
    hook.call = None
    object.__setattr__(hook.layer, "call", hook)
    with pytest.raises(TypeError, match="not callable"):
        check_batch("data", model, normal(2, 3))


@pytest.mark.parametrize("line", range(12))
def test_an_interrupt_while_hooks_are_set_leaves_none(line):
    model, lines = small(), itertools.count()
    layers = {layer.name: layer for layer in model.layers[1:]}

    def interrupt(frame, event, argument):
        if frame.f_code is not observed.__wrapped__.__code__ and frame.f_code.co_name != "_install":
            return None
        if event == "line" and next(lines) == line:
            raise KeyboardInterrupt
        return interrupt

    before = sys.gettrace()
    with pytest.raises(KeyboardInterrupt):
        try:
            sys.settrace(interrupt)
            with observed(layers, doubled([])):
                pass
        finally:
            sys.settrace(before)
    assert not any("call" in vars(layer) for layer in layers.values())
    assert _observers.get() == ()
