"""What breaks if a new version of Keras or TensorFlow moves a private name that the package uses."""

import functools
import importlib.metadata
import importlib.util
import pathlib

import keras
import numpy as np
import pytest
from backends import BACKEND, tensorflow_only

import keras_proxynorm
from keras_proxynorm import compat

PACKAGE = pathlib.Path(keras_proxynorm.__file__).parent


def without_it(consequence):
    """Makes a test that fails, by whatever exception, say what this version of the libraries breaks."""

    def decorate(test):
        @functools.wraps(test)
        def checked(*args, **kwargs):
            try:
                test(*args, **kwargs)
            except Exception as error:
                versions = f"Keras {keras.__version__} on {BACKEND} {importlib.metadata.version(BACKEND)}"
                pytest.fail(f"{versions} changed what keras_proxynorm.compat uses: {consequence}. {error!r}")

        return checked

    return decorate


def test_every_function_has_a_test():
    text = pathlib.Path(__file__).read_text()
    functions = [name for name in compat.__all__ if not isinstance(getattr(compat, name), type)]
    assert [name for name in functions if f"compat.{name}(" not in text] == []


@without_it("the graph of a functional model cannot be read: no surgery, folding or export")
def test_nodes_are_in_the_order_of_computation():
    inputs = keras.Input((3,))
    dense, add = keras.layers.Dense(3), keras.layers.Add()
    outputs = add([dense(inputs), inputs])
    nodes = list(compat.nodes_of(keras.Model(inputs, outputs)))
    assert [node.is_input for node in nodes] == [True, False, False]
    assert [node.operation for node in nodes[1:]] == [dense, add]
    assert nodes[1].args == (inputs,) and nodes[1].kwargs == {}
    assert nodes[2].args[0][0] is nodes[1].outputs[0] and nodes[2].outputs == (outputs,)


@without_it("surgery refuses models of the classes of keras_hub, or clones those with a `call` of their own wrongly")
def test_call_of_functional_models():
    class Subclass(keras.Model):
        def __init__(self):
            inputs = keras.Input((3,))
            super().__init__(inputs, keras.layers.Dense(3)(inputs))

    class Overriding(Subclass):
        def call(self, inputs):
            return 2 * super().call(inputs)

    assert type(Subclass()).call is compat.functional_class().call
    assert type(Overriding()).call is not compat.functional_class().call


@without_it("surgery takes masks that follow a tensor for arguments of a call, or the other way round")
def test_masks_follow_symbolic_tensors():
    tokens = keras.Input((4,), dtype="int32")
    embedded = keras.layers.Embedding(5, 3, mask_zero=True)(tokens)
    assert compat.own_mask(tokens) is None
    assert compat.own_mask(embedded).shape == (None, 4)
    # It follows through layers that support masks, as the same tensor.
    assert compat.own_mask(keras.layers.Dropout(0.5)(embedded)) is compat.own_mask(embedded)


@without_it("layers inside of other layers and models are not found")
def test_layers_inside_are_those_at_any_depth():
    dense = keras.layers.Dense(2)
    inner = keras.Sequential([keras.layers.TimeDistributed(dense)])
    model = keras.Sequential([inner])
    inside = compat.layers_inside(model)
    assert inside[0] is model and any(layer is dense for layer in inside)
    assert all(layer is not model for layer in compat.layers_inside(model, include_self=False))


def decaying():
    """An optimizer with weight decay, and two variables."""
    dense = keras.layers.Dense(2)
    dense.build((None, 3))
    return keras.optimizers.AdamW(weight_decay=0.1), dense.kernel, dense.bias


@without_it("exclude_norm_from_weight_decay forgets what was excluded before, or excludes nothing")
@pytest.mark.parametrize("how", ["var_list", "var_names"])
def test_exclusions_from_weight_decay_add_up(how):
    optimizer, kernel, bias = decaying()
    other, last = (keras.Variable(1.0) for _ in range(2))
    optimizer.exclude_from_weight_decay(**{how: [bias if how == "var_list" else "bias"]})
    optimizer.build([kernel, bias, other, last])
    for variable in (other, last):
        assert optimizer._use_weight_decay(variable)
        compat.exclude_further_from_weight_decay(optimizer, [variable])
    assert [optimizer._use_weight_decay(v) for v in (kernel, bias, other, last)] == [True, False, False, False]


@without_it("surgery does not warn that exclusions from weight decay are lost with the optimizer")
@pytest.mark.parametrize("how", ["var_list", "var_names"])
def test_exclusions_are_seen(how):
    optimizer, _, bias = decaying()
    assert not compat.excludes_from_weight_decay(optimizer)
    optimizer.exclude_from_weight_decay(**{how: [bias if how == "var_list" else "bias"]})
    assert compat.excludes_from_weight_decay(optimizer)


@tensorflow_only
@without_it("what is compiled by XLA on a CPU sums over positions several times slower")
def test_xla_is_recognized():
    import tensorflow as tf

    found = {}

    def function(name, x):
        found[name] = compat.is_compiled_by_xla()
        return x

    x = tf.zeros(())
    function("eager", x)
    tf.function(lambda x: function("graph", x))(x)
    tf.function(lambda x: function("xla", x), jit_compile=True)(x)
    inner = tf.function(lambda x: function("inside", x))
    tf.function(lambda x: inner(x), jit_compile=True)(x)
    assert found == {"eager": False, "graph": False, "xla": True, "inside": True}


@tensorflow_only
@without_it("XLA merges sums, and copies whole inputs on a TPU")
def test_xla_sees_the_barrier():
    import tensorflow as tf

    function = tf.function(lambda x: compat.xla_optimization_barrier(x + 1) + 1, jit_compile=True)
    np.testing.assert_array_equal(function(tf.zeros((2,))), [2, 2])
    assert "opt-barrier" in function.experimental_get_compiler_ir(tf.zeros((2,)))(stage="hlo")


@tensorflow_only
@without_it("under XLA the layers lose digits of large means")
def test_xla_rounds():
    import tensorflow as tf

    function = tf.function(lambda x: compat.xla_reduce_precision(x, 8, 1), jit_compile=True)
    np.testing.assert_array_equal(function(tf.constant([1.4, 2.5, -7])), [1.5, 2, -8])


@tensorflow_only
@without_it("the variables of exported models are not frozen into constants")
def test_variables_become_constants():
    import tensorflow as tf

    variable = tf.Variable([1.0, 2.0])
    concrete = tf.function(lambda x: x * variable).get_concrete_function(tf.TensorSpec((2,)))
    frozen = compat.convert_variables_to_constants(concrete)
    assert len(concrete.variables) == 1 and not frozen.variables and not frozen.captured_inputs
    variable.assign([0.0, 0.0])
    np.testing.assert_array_equal(keras.tree.flatten(frozen(tf.ones((2,)))), [[1, 2]])


@without_it("weights of other kinds of layers would load into ours by position")
def test_own_variables_are_in_the_order_of_files():
    class Wrapping(keras.layers.Layer):
        def build(self, input_shape):
            self.counter = self.add_weight(name="counter", shape=(), trainable=False, initializer="zeros")
            self.gain = self.add_weight(name="gain", shape=())
            self.dense = keras.layers.Dense(2)
            self.dense.build(input_shape)

        def call(self, inputs):
            return inputs

    layer = Wrapping()
    layer.build((None, 3))
    assert [variable.name for variable in compat.own_variables(layer)] == ["gain", "counter"]
    store = {}
    keras.layers.Layer.save_own_variables(layer, store)
    for stored, variable in zip(store.values(), compat.own_variables(layer), strict=True):
        assert stored is variable


class Rematerialized(keras.layers.Layer):
    """Counts how often it is asked to be rematerialized."""

    count = 0

    def rematerialized_call(self, layer_call, *args, **kwargs):
        self.count += 1
        return layer_call

    def call(self, x):
        return x


@without_it("layers made within a keras.RematScope lose their rematerialization, and training needs more memory")
def test_rematerialization_is_copied():
    with keras.RematScope(mode="full"):
        source = Rematerialized()
    target = Rematerialized()
    target(np.ones((2, 3)))
    assert target.count == 0
    compat.copy_rematerialization(source, target)
    target(np.ones((2, 3)))
    assert target.count == 1


@without_it("Lambda layers cannot be cloned")
def test_output_shape_of_a_lambda():
    assert compat.lambda_output_shape(keras.layers.Lambda(lambda x: x, output_shape=(3,))) == (3,)
    assert compat.lambda_output_shape(keras.layers.Lambda(lambda x: x)) is None


@without_it("SharpnessAwareMinimization rounds indices of embeddings to float16")
def test_inputs_are_handed_on_as_they_are():
    class Wrapper(keras.Model):
        def call(self, x):
            return self.model(x)

    ids = keras.Input(())
    model = keras.Model(ids, keras.layers.Identity(dtype="float32")(ids))
    wrapper = Wrapper(dtype="mixed_float16")
    wrapper.model = model
    assert float(wrapper(np.float32([2049.0]))[0]) == 2048
    compat.convert_arguments_like(wrapper, model)
    assert float(wrapper(np.float32([2049.0]))[0]) == 2049


@without_it("SharpnessAwareMinimization does not report a loss")
def test_losses_are_tracked():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    compat.track_loss(model, 2.0, 1)
    compat.track_loss(model, 5.0, 2)
    np.testing.assert_allclose(model.get_metrics_result()["loss"], (1 * 2 + 2 * 5) / 3)


@pytest.mark.skipif(BACKEND != "jax", reason="about JAX")
@without_it("SharpnessAwareMinimization reports no metrics on JAX")
def test_metrics_are_updated():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile("sgd", "mse", metrics=["mae"])
    x, y = np.ones((2, 3), "float32"), np.ones((2, 1), "float32")
    model.evaluate(x, y, verbose=0)
    model.reset_metrics()
    before = [variable.value for variable in model.metrics_variables]
    logs, after = compat.update_metrics(model, before, np.float32(4), x, y, model(x), None)
    assert (float(logs["loss"]), float(logs["mae"])) == (4, 1)
    assert len(after) == len(before) and any(np.any(a != b) for a, b in zip(after, before, strict=True))


def traced(function, *shapes):
    import tensorflow as tf

    specs = [tf.TensorSpec(shape) for shape in shapes]
    return tf.function(function, input_signature=specs, autograph=False).get_concrete_function()


@tensorflow_only
@without_it("grouped convolutions and models with variables cannot be exported to ONNX")
def test_graphs_are_frozen():
    import tensorflow as tf

    compiled = tf.function(lambda x: x * 2.0, jit_compile=True)
    variable = tf.Variable(tf.ones((3, 3)))
    concrete = traced(lambda x: compiled(tf.matmul(x, variable)), (1, 3))
    graph = compat.frozen_graph(concrete, ["x:0"], [concrete.outputs[0].name])
    operations = {node.op for node in graph.node}
    assert {"MatMul", "Mul"} < operations and not any("Call" in op or "Variable" in op for op in operations)


@tensorflow_only
@without_it("exports to ONNX compute the moments of the proxies at each inference")
def test_constants_of_graphs_are_folded():
    import tensorflow as tf

    concrete = traced(lambda x: x + tf.exp(tf.ones(())), (2,))
    graph = compat.optimized_graph(concrete.graph.as_graph_def(add_shapes=True), ["x:0"], [concrete.outputs[0].name])
    assert not any(node.op == "Exp" for node in graph.node)


@tensorflow_only
@without_it("no opset can be checked")
def test_highest_opset():
    pytest.importorskip("tf2onnx")
    assert 17 <= compat.highest_opset() < 100


@tensorflow_only
@without_it("nothing can be exported to ONNX")
def test_graphs_become_onnx():
    pytest.importorskip("tf2onnx")
    concrete = traced(lambda x: -x, (2, 3))
    graph, seen = concrete.graph.as_graph_def(add_shapes=True), []

    def rewrite(graph, nodes):
        seen.extend(node.type for node in nodes)
        return nodes

    proto = compat.onnx_of_graph(graph, {"x:0": "input"}, {concrete.outputs[0].name: "output"}, 17, [rewrite])
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["input", "output"]
    assert [node.op_type for node in proto.graph.node] == ["Neg"] and "Neg" in seen


@without_it("layers made within a keras.RematScope do not train")
def test_rematerialization_mode():
    with keras.RematScope(mode="activations"):
        layer = Rematerialized()
    assert compat.rematerialization_mode(layer) == "activations"
    assert compat.rematerialization_mode(Rematerialized()) is None
