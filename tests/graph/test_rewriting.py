"""Cloning models with operations rewritten, each rule of `Rewrite` by itself."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from surgery.stand_ins import assert_same_outputs, image, nested, outputs, small_model

from keras_proxynorm.graph.reading import check_readable, read_graphs
from keras_proxynorm.graph.rewriting import Rewrite, clone


def nothing_to_carry(source, new):
    return ()


def find(model, name):
    for graph in read_graphs(model):
        for operation in graph.operations:
            if operation.name == name:
                return operation
    raise KeyError(name)


def scaled(factor, name):
    return layers.Rescaling(factor, name=name)


@pytest.mark.parametrize("make", [small_model, nested])
def test_without_rewrites_a_clone_is_the_same_model(make):
    model = make()
    cloned = clone(read_graphs(model))
    assert cloned.replaced == {} and cloned.notes == []
    assert [layer.name for layer in cloned.model.layers] == [layer.name for layer in model.layers]
    assert not {id(w) for w in cloned.model.weights} & {id(w) for w in model.weights}
    assert_same_outputs(model, cloned.model, image(2, 8, 8, 3))
    assert cloned.counterpart(model) is cloned.model


def test_weights_may_stay_behind():
    model = small_model()
    fresh = clone(read_graphs(model), weights=False).model
    assert np.abs(outputs(fresh, image(1, 8, 8, 3))[0] - outputs(model, image(1, 8, 8, 3))[0]).max() > 0


def test_an_operation_becomes_another_layer():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Activation("relu", name="b")(scaled(2.0, "a")(inputs)))
    old = model.get_layer("a")
    cloned = clone(read_graphs(model), [Rewrite(old, lambda: scaled(3.0, "new"), nothing_to_carry)])
    (new,) = cloned.replaced[old]
    assert new.name == "new" and cloned.counterpart(old) is new and old not in cloned.layers
    assert [layer.name for layer in cloned.model.layers[1:]] == ["new", "b"]
    np.testing.assert_array_equal(outputs(cloned.model, np.ones((1, 4)))[0], 3)


@pytest.mark.parametrize("sequential", [False, True])
def test_what_reads_and_what_is_read_may_be_absorbed(sequential):
    parts = [scaled(2.0, "before"), scaled(3.0, "source"), scaled(5.0, "after"), scaled(7.0, "end")]
    if sequential:
        model = keras.Sequential([keras.Input((4,)), *parts])
    else:
        x = inputs = keras.Input((4,))
        for part in parts:
            x = part(x)
        model = keras.Model(inputs, x)
    before, source, after, _ = parts
    graphs = read_graphs(model)
    absorbs = tuple(call for call in graphs[0].calls if call.operation is after)
    rewrite = Rewrite(source, lambda: scaled(30.0, "all"), nothing_to_carry, absorbs, before)
    cloned = clone(graphs, [rewrite]).model
    assert [layer.name for layer in cloned.layers if layer.name in "before source all after end"] == ["all", "end"]
    assert type(cloned) is type(model) and cloned.get_layer("all").output is not None
    np.testing.assert_array_equal(outputs(cloned, np.ones((1, 4)))[0], 210)


def test_several_rewrites_for_several_ways_of_reading():
    inputs = keras.Input((4,))
    x = scaled(2.0, "source")(inputs)
    first, second = scaled(3.0, "first"), scaled(3.0, "second")
    model = keras.Model(inputs, [first(x), second(x), scaled(7.0, "other")(x), x])
    source, graphs = model.get_layer("source"), read_graphs(model)
    absorbs = tuple(call for call in graphs[0].calls if call.operation in (first, second))
    rewrites = [
        Rewrite(source, lambda: scaled(6.0, "both"), nothing_to_carry, absorbs),
        Rewrite(source, lambda: scaled(2.0, "alone"), nothing_to_carry),
        # It is absorbed, and has a name that an output needs.
        Rewrite(second, lambda: layers.Identity(name="second"), nothing_to_carry),
    ]
    cloned = clone(graphs, rewrites)
    assert [layer.name for layer in cloned.replaced[source]] == ["both", "alone"]
    assert [float(y[0, 0]) for y in outputs(cloned.model, np.ones((1, 4)))] == [6, 6, 14, 2]
    assert cloned.model.output_names[1] == "second"


def test_a_shared_activation_is_absorbed_only_in_the_calls_that_are_named():
    inputs = keras.Input((4,))
    relu = layers.ReLU(name="relu")
    x = relu(scaled(2.0, "source")(relu(inputs)))
    model = keras.Model(inputs, scaled(1.0, "end")(x))
    source, graphs = model.get_layer("source"), read_graphs(model)
    absorbs = (graphs[0].maker(x),)
    cloned = clone(graphs, [Rewrite(source, lambda: scaled(5.0, "new"), nothing_to_carry, absorbs)]).model
    assert len(cloned.get_layer("relu")._inbound_nodes) == 1
    np.testing.assert_array_equal(outputs(cloned, -np.ones((1, 4)))[0], 0)


def test_a_rewrite_may_read_further_tensors_and_be_several_layers():
    inputs = keras.Input((4,))
    gate = scaled(3.0, "gate")(inputs)
    x = scaled(2.0, "source")(layers.Multiply(name="product")([inputs, gate]))
    model = keras.Model(inputs, layers.Add(name="sum")([x, gate]))
    add = layers.Add(name="with_gate")
    rewrite = Rewrite(
        model.get_layer("source"),
        lambda: (scaled(2.0, "source"), add),
        nothing_to_carry,
        reads=(gate,),
        call=lambda pair, reads, x: pair[1]([pair[0](x), *reads]),
    )
    cloned = clone(read_graphs(model), [rewrite]).model
    np.testing.assert_array_equal(outputs(cloned, np.ones((1, 4)))[0], 2 * 3 + 3 + 3)


def test_rewrites_reach_into_nested_models_and_carry_their_notes():
    model = nested()
    norm = find(model, "conv_bn")

    def carry(source, new):
        new.set_weights(source.get_weights())
        return ["a note"]

    make = lambda: layers.BatchNormalization(name="other", epsilon=norm.epsilon)  # noqa: E731
    cloned = clone(read_graphs(model), [Rewrite(norm, make, carry)])
    assert cloned.notes == ["a note"]
    assert cloned.model.get_layer("small").get_layer("other") is cloned.replaced[norm][0]
    assert_same_outputs(model, cloned.model, image(2, 8, 8, 3))


def test_arguments_that_the_new_layer_does_not_know_are_left_out():
    steps, mask = keras.Input((5, 8)), keras.Input((5,), dtype="bool")
    norm = layers.BatchNormalization(name="norm")
    model = keras.Model([steps, mask], norm(steps, mask=mask, training=False))
    rewrite = Rewrite(norm, lambda: layers.Identity(name="norm"), nothing_to_carry)
    cloned = clone(read_graphs(model), [rewrite]).model
    x = np.ones((1, 5, 8), "float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(cloned([x, np.ones((1, 5), bool)])), x)


class OverridesCall(keras.Model):
    def call(self, inputs):
        return 2 * super().call(inputs)


class TimesTwo(layers.TimeDistributed):
    def call(self, inputs):
        return 2 * super().call(inputs)


def test_a_model_that_overrides_call_is_refused():
    source = small_model()
    with pytest.raises(ValueError, match="must be a model that computes what its graph says, and not override `call`"):
        check_readable(OverridesCall(source.input, source.output))


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_nested_model_does_in_a_call_of_its_own_is_left_whole(wrapped):
    source = small_model()
    inputs = keras.Input((5, 8, 8, 3) if wrapped else (8, 8, 3))
    inner = TimesTwo(source, name="inner") if wrapped else OverridesCall(source.input, source.output, name="inner")
    model = keras.Model(inputs, layers.Dense(2)(inner(inputs)))
    graphs = read_graphs(model)
    assert len(graphs) == 1
    assert_same_outputs(model, clone(graphs).model, image(1, *inputs.shape[1:]))


def test_names_come_through_configs_that_lack_them():
    class Nameless(layers.Layer):
        def call(self, inputs):
            return inputs + 1

        def get_config(self):
            return {}

    inputs = keras.Input((4,))
    model = keras.Model(inputs, Nameless(name="logits")(inputs))
    assert clone(read_graphs(model)).model.output_names == ["logits"]


class Holder(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        return self.dense(inputs)


def test_policies_of_layers_inside_come_through():
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Holder()(inputs))
    keras.config.set_dtype_policy("float32")
    cloned = clone(read_graphs(model)).model
    assert cloned.layers[-1].dense.compute_dtype == "float16"
    assert_same_outputs(model, cloned, image(2, 4) / 255)


def test_quantized_layers_inside_of_others_are_named():
    inputs = keras.Input((4, 8))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs))
    model.quantize("int8")
    with pytest.raises(ValueError, match="'attention'.*quantized or have adapters"):
        clone(read_graphs(model))
