"""Graphs without their transposes compute what they computed before, and those that are left have a reason."""

import contextlib

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from keras import layers, ops

from keras_proxynorm.export.logs import errors_of
from keras_proxynorm.export.onnx_layout import remove_transposes
from keras_proxynorm.export.serving_function import serving_function

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def run(proto, inputs):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    # Its own layout optimizations would hide what is in the file.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def rewritten(proto):
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    remove_transposes(result)
    onnx.checker.check_model(result, full_check=True)
    return result


def inner(proto):
    """The transposes that are not next to an input or an output of the graph."""
    inputs, outputs = ({value.name for value in values} for values in (proto.graph.input, proto.graph.output))
    return [
        node
        for node in proto.graph.node
        if node.op_type == "Transpose" and not inputs.intersection(node.input) and not outputs.intersection(node.output)
    ]


def count(proto, op):
    return sum(node.op_type == op for node in proto.graph.node)


def convert(model, batch_size=None):
    import tensorflow as tf
    import tf2onnx.convert

    serve, signature = serving_function(model, batch_size, None)
    function = tf.function(serve, input_signature=signature, autograph=False)
    traced = function.get_concrete_function()
    with errors_of("tf2onnx") as errors:
        proto, _ = tf2onnx.convert.from_function(function, signature, opset=17)
    assert errors == []
    # The constants of Keras's Normalization are tensors, which the converter takes for inputs.
    captured = {
        inside.name: outside
        for outside, inside in zip(traced.captured_inputs, traced.inputs[len(signature) :], strict=True)
    }
    for value in [value for value in proto.graph.input if value.name in captured]:
        proto.graph.input.remove(value)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(captured[value.name].numpy(), value.name))
    return proto


def check_model(model, proto, batch_size):
    """The rewritten graph, after comparing it with the model and with the graph as it was."""
    import tensorflow as tf

    result = rewritten(proto)
    assert [value.name for value in result.graph.output] == [value.name for value in proto.graph.output]
    x = np.random.default_rng(0).standard_normal((batch_size, *model.inputs[0].shape[1:])).astype("float32")
    before, after = (run(graph, {graph.graph.input[0].name: x}) for graph in (proto, result))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5 * np.abs(old).max())
    serve, _ = serving_function(model, batch_size, None)
    # XLA has convolutions with channels first on every CPU, TensorFlow by itself only where it uses oneDNN.
    expected = tf.function(serve, jit_compile=True, autograph=False)(ops.convert_to_tensor(x))
    for value, new in zip(result.graph.output, after, strict=True):
        old = np.asarray(expected[value.name])
        np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-4 * np.abs(old).max())
    return result


def conv(channels, kernel=3, **arguments):
    return layers.Conv2D(channels, kernel, padding="same", **arguments)


def activations(x):
    for activation in ("hard_silu", "hard_sigmoid", "mish", "silu", "relu6", "softsign", "selu", "softplus"):
        x = conv(4, activation=activation, use_bias=False)(x)
    return conv(4)(layers.PReLU(shared_axes=[1, 2])(x))


def norms(x):
    for layer in (layers.BatchNormalization(), layers.LayerNormalization(), layers.GroupNormalization(2)):
        x = conv(4)(layer(x))
    return x


def squeeze_excite(x):
    x = conv(8)(x)
    gate = conv(8, 1, activation="sigmoid")(layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(x)))
    x = layers.Multiply()([x, gate])
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = layers.Multiply()([conv(8, 1, activation="hard_sigmoid")(gate), x])
    gate = [ops.mean(x, axis=-1, keepdims=True), ops.max(x, axis=-1, keepdims=True)]
    return conv(4)(x * conv(1, 7, activation="sigmoid")(layers.Concatenate()(gate)))


def preprocessing(x):
    x = layers.Normalization(mean=[0.4, 0.5, 0.6, 0.7], variance=[0.2, 0.3, 0.2, 0.1])(x)
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(x)
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(x)
    return layers.Conv2D(4, 3, strides=2)(x)


def head(x):
    x = layers.GlobalAveragePooling2D(keepdims=True)(conv(8, activation="hard_silu", use_bias=False)(x))
    return layers.Flatten()(conv(5, 1)(layers.Dropout(0.1)(x)))


def u_net(x):
    high = conv(8, activation="relu")(x)
    low = layers.UpSampling2D()(conv(8)(layers.MaxPooling2D()(high)))
    x = conv(4, strides=2)(layers.Concatenate()([high, low]))
    return layers.Softmax()(conv(3, 1)(layers.UpSampling2D(interpolation="bilinear")(x)))


def slices(x):
    left, right = ops.split(conv(8)(x), 2, axis=-1)
    x = layers.Cropping2D(((1, 0), (0, 1)))(left * right)
    x = layers.DepthwiseConv2D(3, dilation_rate=2, padding="same")(x)
    return layers.Conv2DTranspose(4, 3, strides=2, padding="same")(x[:, :, ::2])


def channels_last_inside(x):
    """As a folded normalization is traced."""
    x = y = conv(8, use_bias=False)(x)
    y = ops.reshape(ops.transpose(y, (0, 3, 1, 2)), (-1, 2, 4 * 6 * 8))
    y = layers.Softmax(axis=-1)(y)
    y = ops.transpose(ops.reshape(y, (-1, 8, 6, 8)), (0, 2, 3, 1))
    return conv(4)(ops.relu(layers.DepthwiseConv2D(1)(y)) + x)


def channels_first(x):
    first = {"data_format": "channels_first"}
    x = layers.Conv2D(8, 3, activation="relu", **first)(layers.ZeroPadding2D(1, **first)(x))
    x = layers.DepthwiseConv2D(3, padding="same", **first)(layers.MaxPooling2D(**first)(x))
    x = x + layers.Conv2D(8, 1, activation="hard_silu", **first)(layers.BatchNormalization(axis=1)(x))
    return layers.GlobalAveragePooling2D(**first)(x)


def sequence(x):
    x = layers.Conv1D(8, 3, padding="causal", activation="silu")(x)
    x = layers.MaxPooling1D()(layers.SeparableConv1D(8, 3, padding="same")(layers.BatchNormalization()(x)))
    x = layers.ReLU()(x + layers.Conv1D(8, 3, padding="same", dilation_rate=2)(x))
    return layers.GlobalAveragePooling1D()(layers.Conv1D(6, 3, strides=2)(x))


def volume(x):
    x = layers.MaxPooling3D(2)(layers.Conv3D(4, 3, padding="same", activation="hard_silu")(x))
    return layers.GlobalAveragePooling3D()(layers.Conv3D(4, 2)(layers.BatchNormalization()(x)))


def recurrent(x):
    # Its loop is a graph within the graph.
    return layers.Conv1D(4, 3)(layers.LSTM(6, return_sequences=True)(layers.Conv1D(8, 3)(x)))


def outputs(x):
    x = conv(8, activation="relu")(x)
    y = conv(8, activation="silu")(x)
    return [x, y, layers.GlobalMaxPooling2D(keepdims=True)(x + y), layers.Permute((3, 1, 2))(y), layers.Flatten()(y)]


def flatten(x):
    return layers.Dense(3)(layers.Flatten()(conv(8, activation="relu")(x)))


# Each with the shape of its input, and the transposes that have to stay inside.
MODELS = {
    activations: ((6, 8, 4), 0),
    norms: ((6, 8, 4), 0),
    squeeze_excite: ((6, 8, 4), 0),
    preprocessing: ((6, 8, 4), 0),
    head: ((6, 8, 4), 0),
    u_net: ((12, 8, 4), 0),
    slices: ((6, 8, 4), 0),
    channels_last_inside: ((6, 8, 4), 0),
    channels_first: ((4, 6, 8), 0),
    sequence: ((20, 4), 1),
    volume: ((8, 8, 8, 2), 0),
    recurrent: ((10, 4), 5),
    flatten: ((6, 8, 4), 1),
    outputs: ((6, 8, 4), 0),
}


@tensorflow_only
@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_models(make, batch_size):
    shape, needed = MODELS[make]
    keras.utils.set_random_seed(0)
    x = keras.Input(shape, name="x")
    model = keras.Model(x, make(x))
    result = check_model(model, convert(model, batch_size), batch_size or 3)
    assert len(inner(result)) <= needed
    assert count(result, "Transpose") <= needed + 1 + len(model.outputs)


FAMILIES = {
    "MobileNetV3Small": 64,
    "MobileNet": 64,
    "MobileNetV2": 64,
    "MobileNetV3Large": 64,
    "EfficientNetB0": 64,
    "EfficientNetV2B0": 64,
    "ResNet50": 64,
    "ResNet50V2": 64,
    "DenseNet121": 64,
    "NASNetMobile": 64,
    "Xception": 75,
    "InceptionV3": 75,
    "InceptionResNetV2": 75,
    "VGG16": 64,
}


@tensorflow_only
@pytest.mark.slow
@pytest.mark.parametrize("top", [True, False], ids=["top", "no_top"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, top):
    arguments = {"classes": 10, "classifier_activation": None} if top else {}
    shape = (FAMILIES[family], FAMILIES[family], 3)
    model = getattr(keras.applications, family)(weights=None, include_top=top, input_shape=shape, **arguments)
    result = check_model(model, convert(model), 2)
    # VGG flattens a map.
    assert len(inner(result)) == (top and family == "VGG16")
    assert count(result, "Transpose") <= (2 if family == "VGG16" or not top else 1)


class RandomGraph:
    """Operations on random tensors of a few elements, half of them transposes."""

    def __init__(self, seed, opset):
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes, self.weights, self.tensors = [], [], []

    def name(self):
        return f"t{len(self.nodes) + len(self.weights)}_{len(self.tensors)}"

    def weight(self, value):
        name = "w" + self.name()
        self.weights.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def integers(self, values, dtype=np.int64):
        return self.weight(np.array([*values], dtype))

    def add(self, op, inputs, *shapes, hidden=False, **attributes):
        names = [f"{self.name()}_{i}" for i in range(len(shapes))]
        self.nodes.append(onnx.helper.make_node(op, inputs, names, **attributes))
        self.tensors += [] if hidden else zip(names, map(tuple, shapes), strict=True)
        return names[0]

    def step(self):
        x, shape = self.tensors[-1 - self.rng.integers(min(3, len(self.tensors)))]
        kinds = [self.elementwise, self.broadcast, self.two, self.reshape, self.reduce, self.along_axis, self.convolve]
        if self.rng.random() < 0.5:
            perm = self.rng.permutation(len(shape)).tolist()
            self.add("Transpose", [x], [shape[axis] for axis in perm], perm=perm)
        else:
            kinds[self.rng.integers(len(kinds))](x, shape)

    def elementwise(self, x, shape):
        op = self.rng.choice(["Relu", "Sigmoid", "HardSwish", "Identity", "Clip", "Where"])
        inputs = [x]
        if op == "Where":
            inputs = [self.add("Greater", [x, self.weight(np.float32(0))], shape, hidden=True), x]
        if op in ("Clip", "Where"):
            inputs.append(self.weight(np.float32(0.3)))
        self.add(op, inputs, shape)

    def broadcast(self, x, shape):
        sizes = [size if self.rng.random() < 0.6 else 1 for size in shape[self.rng.integers(len(shape) + 1) :]]
        weight = self.weight(self.rng.uniform(-1, 1, sizes).astype("float32"))
        op = self.rng.choice(["Add", "Mul", "Sub", "PRelu"])
        self.add(op, [x, weight] if op == "PRelu" or self.rng.random() < 0.6 else [weight, x], shape)

    def two(self, x, shape):
        others = []
        for other, sizes in self.tensors:
            with contextlib.suppress(ValueError):
                others.append((other, np.broadcast_shapes(shape, sizes)))
        other, result = others[self.rng.integers(len(others))]
        if len(result) < 6 and np.prod(result) < 2000:
            self.add(self.rng.choice(["Add", "Mul", "Max"]), [x, other], result)

    def reshape(self, x, shape):
        # The first axis stays the first, wherever the transposes have put it.
        new = [*shape[1:]] or [1]
        i = self.rng.integers(len(new))
        kind = self.rng.integers(4)
        if kind == 0:
            new[i : i + 2] = [int(np.prod(new[i : i + 2]))]
        elif kind == 1 and len(new) < 4:
            new[i : i + 1] = [2, new[i] // 2] if new[i] % 2 == 0 else [1, new[i]]
        elif kind == 2:
            new = [size for size in new if size != 1]
        else:
            new = self.rng.permutation(new).tolist()
        first = self.rng.integers(3)
        if first < 2:
            self.add("Reshape", [x, self.integers([-first, *new])], [shape[0], *new])
        else:
            sizes = self.add("Shape", [x], [len(shape)], hidden=True)
            sizes = self.add("Slice", [sizes, self.integers([0]), self.integers([1])], [1], hidden=True)
            sizes = self.add("Concat", [sizes, self.integers(new)], [len(new) + 1], hidden=True, axis=0)
            self.add("Reshape", [x, sizes], [shape[0], *new])

    def reduce(self, x, shape):
        axes = [axis for axis in range(1, len(shape)) if self.rng.random() < 0.5]
        keepdims = int(self.rng.integers(2))
        new = [1 if axis in axes else size for axis, size in enumerate(shape) if keepdims or axis not in axes]
        signed = [axis - self.rng.integers(2) * len(shape) for axis in axes]
        if not axes:
            return
        if self.rng.random() < 0.3:
            new = [1 if axis == axes[0] else size for axis, size in enumerate(shape) if keepdims or axis != axes[0]]
            index = self.add("ArgMax", [x], new, hidden=True, axis=int(signed[0]), keepdims=keepdims)
            self.add("Cast", [index], new, to=onnx.TensorProto.FLOAT)
        elif self.opset < 18 and self.rng.random() < 0.7:
            self.add("ReduceMean", [x], new, axes=[int(axis) for axis in signed], keepdims=keepdims)
        else:
            op = "ReduceMean" if self.opset >= 18 and self.rng.random() < 0.7 else "ReduceSum"
            self.add(op, [x, self.integers(signed)], new, keepdims=keepdims)

    def along_axis(self, x, shape):
        if len(shape) < 2:
            return
        axis = int(self.rng.integers(1, len(shape)))
        signed, size = int(axis - self.rng.integers(2) * len(shape)), shape[axis]
        op = self.rng.choice(["Softmax", "Concat", "Pad", "Slice", "Tile", "Split"])

        def resized(new):
            return [new if i == axis else old for i, old in enumerate(shape)]

        if op == "Softmax":
            self.add(op, [x], shape, axis=signed)
        elif op == "Concat":
            self.add(op, [x, x], resized(2 * size), axis=signed)
        elif op == "Pad":
            pads = [int(i == axis) for i in range(len(shape))] + [0] * len(shape)
            self.add(op, [x, self.integers(pads)], resized(size + 1))
        elif op == "Slice":
            dtype = [np.int32, np.int64][self.rng.integers(2)]
            bounds = [self.integers([value], dtype) for value in (size // 2, size, signed)]
            self.add(op, [x, *bounds], resized(size - size // 2))
        elif op == "Tile" and np.prod(shape) < 500:
            self.add(op, [x, self.integers([1 + (i == axis) for i in range(len(shape))])], resized(2 * size))
        elif op == "Split" and size > 1:
            self.add(op, [x, self.integers([1, size - 1])], resized(1), resized(size - 1), axis=signed)

    def convolve(self, x, shape):
        if len(shape) == 4:
            kernel = self.rng.uniform(-1, 1, (2, shape[1], 1, 1)).astype("float32")
            self.add("Conv", [x, self.weight(kernel)], [shape[0], 2, *shape[2:]])
        else:
            self.add(
                "MatMul", [x, self.weight(self.rng.uniform(-1, 1, (shape[-1], 3)).astype("float32"))], [*shape[:-1], 3]
            )


@pytest.mark.parametrize("opset", [14, 17, 18])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_random_graphs(batch_size, opset):
    for seed in range(60):
        graph = RandomGraph(seed, opset)
        rng = graph.rng
        for name in "xy":
            graph.tensors.append((name, (batch_size or 2, *rng.integers(1, 5, rng.integers(1, 4)).tolist())))
        feeds = {name: rng.uniform(-1, 1, shape).astype("float32") for name, shape in graph.tensors}
        values = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch_size, *shape[1:]])
            for name, shape in graph.tensors
        ]
        for _ in range(30):
            graph.step()
        results = [graph.tensors[i] for i in {*rng.integers(2, len(graph.tensors), 3).tolist(), len(graph.tensors) - 1}]
        outputs = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * len(shape))
            for name, shape in results
        ]
        proto = onnx.helper.make_model(
            onnx.helper.make_graph(graph.nodes, "random", values, outputs, graph.weights),
            opset_imports=[onnx.helper.make_opsetid("", opset)],
            ir_version=8,
        )
        result = rewritten(proto)
        assert count(result, "Transpose") <= count(proto, "Transpose")
        for old, new in zip(run(proto, feeds), run(result, feeds), strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5, err_msg=f"seed {seed}")


def parsed(text):
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    onnx.checker.check_model(proto, full_check=True)
    return proto


def test_nothing_to_do():
    proto = parsed("(float[N,4] x) => (float[N,4] y) { h = Relu(x) y = Sigmoid(h) }")
    assert rewritten(proto).graph == proto.graph


def test_never_more_than_before():
    proto = parsed(
        "(float[N,4,4] x) => (float[N,4,4] u, float[N,4,4] y, float[N,4,4] z) <int64 axis = {1}> { u = Neg(x)"
        "t = Transpose<perm=[0,2,1]>(u) y = CumSum(t, axis) r = Relu(t) z = CumSum(r, axis) }"
    )
    assert rewritten(proto).graph == proto.graph


def test_one_transpose_for_all_that_need_it():
    proto = parsed(
        "(float[N,4,5] x) => (float[N,5,2] y, float[N,5,2] z) <float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {"
        "a = Transpose<perm=[0,2,1]>(x) b = Transpose<perm=[0,2,1]>(x) y = MatMul(a, w) z = MatMul(b, w) }"
    )
    assert count(rewritten(proto), "Transpose") == 1


def test_names_of_outputs():
    proto = parsed(
        "(float[N,4,5] x) => (float[N,4,5] y, float[N,4,5] z, float[N,4,5] u) { r = Relu(x)"
        "a = Transpose<perm=[0,2,1]>(r) y = Transpose<perm=[0,2,1]>(a) b = Transpose<perm=[0,2,1]>(r)"
        "z = Transpose<perm=[0,2,1]>(b) c = Transpose<perm=[0,2,1]>(x) u = Transpose<perm=[0,2,1]>(c) }"
    )
    result = rewritten(proto)
    assert [value.name for value in result.graph.output] == ["y", "z", "u"] and count(result, "Transpose") == 0
    x = np.random.default_rng(0).standard_normal((2, 4, 5)).astype("float32")
    for output, expected in zip(run(result, {"x": x}), (x.clip(0), x.clip(0), x), strict=True):
        np.testing.assert_array_equal(output, expected)


def test_what_a_graph_inside_reads():
    proto = parsed(
        "(float[N,4,5] x, bool c) => (float[N,5,4] y) { t = Transpose<perm=[0,2,1]>(x) r = Relu(t)"
        "y = If(c) <then_branch = a () => (float[N,5,4] p) { p = Neg(r) },"
        "else_branch = b () => (float[N,5,4] q) { q = Add(r, t) }> }"
    )
    x = np.random.default_rng(0).standard_normal((2, 4, 5)).astype("float32")
    for c in (True, False):
        inputs = {"x": x, "c": np.array(c)}
        np.testing.assert_array_equal(run(rewritten(proto), inputs)[0], run(proto, inputs)[0])


def test_axes_of_size_one():
    proto = parsed(
        "(float[N,4] x) => (float[N,4,1,1] y) <int64[4] s = {-1, 1, 1, 4}> {"
        "r = Reshape(x, s) y = Transpose<perm=[0,3,1,2]>(r) }"
    )
    assert [node.op_type for node in rewritten(proto).graph.node] == ["Reshape"]
