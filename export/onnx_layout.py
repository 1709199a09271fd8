"""Takes out of an ONNX graph the transpositions that a converter put around operations on channels-first data."""

import math

from keras_proxynorm.export.onnx_weights import initializer
from keras_proxynorm.export.onnx_weights import value_of

__all__ = ["infer_tensors", "remove_transposes"]

# Operations on each element of their first input; the other inputs are scalars.
_UNARY = {
    *str.split(
        "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu "
        "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink "
        "Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
    )
}
# Operations on each element of several inputs that are broadcast to one shape.
_BROADCAST = {
    *str.split(
        "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod "
        "Mul Or PRelu Pow Sub Sum Where Xor"
    )
}
# The axis that each of these takes when it has no such attribute.
_ALONG_AXIS = {"Hardmax": -1, "LogSoftmax": -1, "Softmax": -1, "Split": 0}
_REDUCE = {f"Reduce{kind}" for kind in str.split("L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare")}
_RESHAPE = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}
_KEEPS_RANK = _UNARY | _BROADCAST | {*_ALONG_AXIS, "Concat", "Pad", "Slice", "Tile"}


def remove_transposes(proto, arrays: dict | None = None) -> None:
    """Rewrites the graph of an `onnx.ModelProto` in place, so that as few transpositions as possible are computed.

    No transposition is written down where it occurs. It stays a note on its result, which says how this follows from
    another tensor, and the operations after it that work in any order of the axes are applied to that other tensor. Two
    that undo each other meet on the way and are gone. One is written down, once, for an operation that needs its
    result; as a Reshape if only axes of size 1 change places. Graph inputs are transposed at once where what follows
    wants that. If all this does not pay, the graph stays as it is.

    The results are the same to the last bit but for the order of sums in reductions. Means over all spatial axes become
    GlobalAveragePool, and shapes that are known become constants.

    Args:
        proto: A valid model of opset 13 or later. Graphs inside its nodes are left as they are.
        arrays: The values of its large weights by name, see `onnx_weights`; those of new ones are added.
    """
    _Rewriter(proto, {} if arrays is None else arrays).run()


def infer_tensors(proto) -> list:
    """What shape inference finds out about the tensors of an `onnx.ModelProto`: a list of `onnx.ValueInfoProto`."""
    import onnx

    # Without the values of large weights, because what is inferred from must be smaller than 2 GB.
    skeleton = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    skeleton.graph.name = proto.graph.name
    skeleton.graph.node.extend(proto.graph.node)
    skeleton.graph.input.extend(proto.graph.input)
    skeleton.graph.output.extend(proto.graph.output)
    skeleton.functions.extend(proto.functions)
    for weight in proto.graph.initializer:
        if _size(weight.dims) < 1024:
            skeleton.graph.initializer.append(weight)
        else:
            value = onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
            skeleton.graph.input.append(value)
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    return [*inferred.value_info, *inferred.input, *inferred.output]


class _Rewriter:
    """The graph that is being written.

    A permutation reads as in Transpose: axis ``i`` of the result is axis ``perm[i]`` of what it is made from.
    """

    def __init__(self, proto, arrays):
        import onnx

        self.onnx = onnx
        self.arrays = arrays
        self.graph = proto.graph
        # What converters note of shapes is not always true after their own optimizations.
        del self.graph.value_info[:]
        # Sizes are integers, or None where they are open.
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        self.types = {}
        for value in infer_tensors(proto):
            tensor = value.type.tensor_type
            self.types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.shapes[value.name] = tuple(
                    size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim
                )
        self.constants = {weight.name: weight for weight in self.graph.initializer}
        self.shapes.update({name: tuple(weight.dims) for name, weight in self.constants.items()})
        self.nodes: list = []
        self.producers: dict = {}
        # What each tensor is: a transposition of a tensor that is in the graph.
        self.views: dict[str, tuple[str, tuple[int, ...]]] = {}
        # The transpositions that are in the graph.
        self.made: dict[tuple[str, tuple[int, ...]], str] = {}
        # Graphs inside of nodes refer to tensors outside of them by name.
        self.captured = {name for node in self.graph.node for name in _captured(node)}
        self.names = set(self.shapes) | self.captured | {name for node in self.graph.node for name in node.output}
        self.wanted = self.wishes()

    def wishes(self):
        """The permutations that tensors should be views by, so that transpositions further down cancel."""
        wanted: dict[str, tuple[int, ...]] = {}
        for node in reversed(self.graph.node):
            output = node.output[0]
            if output not in self.shapes:
                continue
            if node.op_type == "Transpose":
                after = wanted.get(output, _identity(len(self.shapes[output])))
                wanted[node.input[0]] = _compose(after, _inverse(self.permutation(node)))
            elif node.op_type in _RESHAPE and output in wanted and node.input[0] in self.shapes:
                shapes = self.shapes[output], self.shapes[node.input[0]]
                axes = _reorder(*shapes, wanted[output]) if _can_reshape(*shapes) else None
                if axes is not None:
                    wanted[node.input[0]] = _inverse(axes)
            elif node.op_type in _KEEPS_RANK and output in wanted:
                for name in node.input:
                    if len(self.shapes.get(name, ())) == len(self.shapes[output]):
                        wanted.setdefault(name, wanted[output])
        return {name: perm for name, perm in wanted.items() if perm != _identity(len(perm))}

    def run(self):
        for value in self.graph.input:
            if value.name in self.wanted and value.name not in self.constants:
                perm = self.wanted[value.name]
                base = self.transposed(value.name, _inverse(perm))
                self.views[value.name] = base, perm
                self.made[base, perm] = value.name
        for node in self.graph.node:
            names = {*node.input, *node.output} - {""}
            known = node.domain in ("", "ai.onnx") and names <= self.shapes.keys()
            if not known or self.captured.intersection(node.output) or not self.rewrite(node):
                self.copy(node, [self.value(name) for name in node.input], node.output)
        self.finish()

    def rewrite(self, node):
        """Adds what takes the place of `node` to the graph, or returns False."""
        op = node.op_type
        if op in _BROADCAST or op == "Concat":
            return self.join(node)
        if not node.input or not self.shapes.get(node.input[0]):
            return False
        base, perm = self.view(node.input[0])
        if op == "Transpose":
            self.views[node.output[0]] = base, _compose(perm, self.permutation(node))
            return True
        if op in _RESHAPE:
            return self.reshape(node.input[0], node.output[0], self.shapes[node.output[0]])
        if op in _REDUCE or op in ("ArgMax", "ArgMin"):
            return self.reduce(node, base, perm)
        if perm == _identity(len(perm)):
            return False
        rest = [self.value(name) for name in node.input[1:]]
        if op in _UNARY:
            return self.through(node, [base, *rest], perm)
        if op in _ALONG_AXIS:
            axis = perm[self.attribute(node, "axis", _ALONG_AXIS[op])]
            return self.through(node, [base, *rest], perm, axis=axis)
        if op == "Shape" and not node.attribute:
            self.add(self.onnx.helper.make_node("Shape", [base], [self.name(node.output[0])]))
            order = self.integers(perm)
            self.add(self.onnx.helper.make_node("Gather", [self.nodes[-1].output[0], order], node.output))
            return True
        values = [self.array(name) for name in rest]
        if op == "Tile" and values[0] is not None:
            return self.through(node, [base, self.integers(values[0][i] for i in _inverse(perm))], perm)
        if op == "Pad" and values[0] is not None and len(rest) < 3:
            before, after = values[0].reshape(2, -1).tolist()
            pads = [pads[i] for pads in (before, after) for i in _inverse(perm)]
            return self.through(node, [base, self.integers(pads), *rest[1:]], perm)
        if op == "Slice" and len(rest) > 2 and values[2] is not None:
            axes = self.constant("axes", values[2].dtype.type([perm[axis] for axis in values[2]]))
            return self.through(node, [base, *rest[:2], axes, *rest[3:]], perm)
        return False

    def join(self, node):
        """An operation on several tensors, in the order of axes that costs the fewest transposed elements."""
        output = node.output[0]
        rank = len(self.shapes[output])
        plain = _identity(rank)
        wanted = self.wanted.get(output, plain)
        wide = [name for name in node.input if len(self.shapes[name]) == rank and name not in self.constants]
        if not all({1}.issuperset(self.shapes[name]) for name in {*node.input}.difference(wide, self.constants)):
            return False

        def cost(perm):
            moved = [name for name in {*wide} if not self.is_at_hand(*self.relative(name, perm))]
            return sum(_size(self.shapes[name]) for name in moved + [output] * (perm != wanted))

        # The first of the cheapest: better to leave to later operations what they may undo than to transpose now.
        perm = min([*(perm for _, perm in map(self.view, wide) if perm != plain), plain, wanted], key=cost)
        if perm == plain:
            return False
        inputs = []
        for name in node.input:
            if len(self.shapes[name]) < rank and name in self.constants:
                value = self.array(name)
                name = self.constant(name, value.reshape((1,) * (rank - value.ndim) + value.shape))
            narrow = len(self.shapes[name]) < rank
            inputs.append(self.value(name) if narrow else self.transposed(*self.relative(name, perm)))
        if node.op_type == "Concat":
            return self.through(node, inputs, perm, axis=perm[self.attribute(node, "axis", 0)])
        return self.through(node, inputs, perm)

    def reshape(self, name, output, shape):
        """Makes `output` from `name`, the transposition after the change of shape if it has a place there."""
        before = self.shapes[name]
        if not _can_reshape(before, shape):
            return False
        base, perm = self.view(name)
        axes = _reorder(before, shape, perm)
        if axes is None:
            base, axes = self.value(name), _identity(len(shape))
        self.shapes[output] = shape
        self.views[output] = self.reshaped(base, tuple(shape[i] for i in axes)), _inverse(axes)
        return True

    def reshaped(self, name, shape):
        """`name` in a shape with one open size at most."""
        if name in self.constants:
            return self.constant(name, self.array(name).reshape(shape))
        while name in self.producers and self.producers[name].op_type in _RESHAPE:
            name = self.producers[name].input[0]
        if self.shapes.get(name) == shape:
            return name
        sizes = self.integers(-1 if size is None else size for size in shape)
        output = self.name(name)
        self.add(self.onnx.helper.make_node("Reshape", [name, sizes], [output]), shape)
        return output

    def reduce(self, node, base, perm):
        rank = len(perm)
        keeps = self.attribute(node, "keepdims", 1)
        if node.op_type.startswith("Arg"):
            axes = [self.attribute(node, "axis", 0)]
        else:
            axes = self.attribute(node, "axes", None)
            if len(node.input) > 1 and node.input[1]:
                axes = self.array(node.input[1])
                if axes is None:
                    return False
            if axes is None or len(axes) == 0:
                if self.attribute(node, "noop_with_empty_axes", 0):
                    return False
                axes = [*range(rank)]
        dropped = sorted(perm[axis] for axis in axes)
        output = node.output[0]
        pooled = tuple(1 if i in dropped else size for i, size in enumerate(self.shapes[base]))
        spatial = dropped == list(range(2, rank)) and rank > 3 and pooled.count(None) < 2 and 0 not in pooled
        if spatial and node.op_type == "ReduceMean" and self.types.get(output) == self.onnx.TensorProto.FLOAT:
            mean = self.name(output)
            self.add(self.onnx.helper.make_node("GlobalAveragePool", [base], [self.name(output)]), pooled)
            self.views[mean] = self.nodes[-1].output[0], perm
            self.shapes[mean] = tuple(pooled[i] for i in perm)
            return self.reshape(mean, output, self.shapes[output])
        if perm == _identity(rank):
            return False
        if not keeps:
            left = [axis for axis in range(rank) if axis not in dropped]
            perm = tuple(left.index(axis) for axis in perm if axis in left)
        if node.op_type.startswith("Arg"):
            return self.through(node, [base], perm, axis=dropped[0])
        inputs = [base, self.integers(dropped)] if len(node.input) > 1 and node.input[1] else [base]
        attributes = {"axes": dropped} if self.attribute(node, "axes", None) else {}
        return self.through(node, inputs, perm, **attributes)

    def through(self, node, inputs, perm, **attributes):
        """Adds `node` with other inputs, of which its outputs are views by `perm`."""
        outputs = [self.name(name) if name else "" for name in node.output]
        for name, output in zip(node.output, outputs, strict=True):
            if name:
                self.views[name] = output, perm
                self.shapes[output] = tuple(self.shapes[name][i] for i in _inverse(perm))
        self.copy(node, inputs, outputs, **attributes)
        return True

    def copy(self, node, inputs, outputs, **attributes):
        copied = self.onnx.NodeProto()
        copied.CopyFrom(node)
        kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
        new = [self.onnx.helper.make_attribute(name, value) for name, value in attributes.items()]
        del copied.input[:], copied.output[:], copied.attribute[:]
        copied.input.extend(inputs)
        copied.output.extend(outputs)
        copied.attribute.extend(kept + new)
        self.add(copied)

    def add(self, node, shape=None):
        self.nodes.append(node)
        self.producers.update(dict.fromkeys(node.output, node))
        if shape is not None:
            self.shapes[node.output[0]] = shape

    def view(self, name):
        return self.views.get(name) or (name, _identity(len(self.shapes[name])))

    def relative(self, name, perm):
        """What must be transposed, and how, to get the tensor that `name` is a view of by `perm`."""
        base, own = self.view(name)
        return base, _compose(own, _inverse(perm))

    def value(self, name):
        """The tensor in the graph that is `name`."""
        return self.transposed(*self.views[name]) if name in self.views else name

    def transposed(self, base, perm):
        if perm == _identity(len(perm)):
            return base
        if (base, perm) not in self.made:
            shape = tuple(self.shapes[base][i] for i in perm)
            if base in self.constants:
                output = self.constant(base, self.array(base).transpose(perm))
            elif self.is_at_hand(base, perm):
                output = self.reshaped(base, shape)
            else:
                output = self.name(base)
                self.add(self.onnx.helper.make_node("Transpose", [base], [output], perm=perm), shape)
            self.made[base, perm] = output
        return self.made[base, perm]

    def is_at_hand(self, base, perm):
        """Whether a transposition moves nothing, because it is there already or only axes of size 1 change places."""
        shape = self.shapes[base]
        kept = [axis for axis in perm if shape[axis] != 1]
        return (base, perm) in self.made or (kept == sorted(kept) and 0 not in shape and shape.count(None) < 2)

    def constant(self, name, value):
        name = self.name(name)
        self.constants[name] = initializer(name, value, self.arrays)
        self.shapes[name] = value.shape
        return name

    def integers(self, values):
        import numpy as np

        return self.constant("axes", np.array([*map(int, values)], np.int64))

    def array(self, name):
        return value_of(self.constants[name], self.arrays) if name in self.constants else None

    def name(self, like):
        """A new name like another."""
        stem = like.partition("__nchw")[0]
        number = len(self.names)
        while (name := f"{stem}__nchw{number}") in self.names:
            number += 1
        self.names.add(name)
        return name

    def attribute(self, node, name, default):
        for attribute in node.attribute:
            if attribute.name == name:
                return self.onnx.helper.get_attribute_value(attribute)
        return default

    def permutation(self, node):
        perm = self.attribute(node, "perm", None)
        return tuple(perm) if perm else _identity(len(self.shapes[node.input[0]]))[::-1]

    def finish(self):
        """Puts the new nodes into the graph, less what no output needs."""
        outputs = {value.name for value in self.graph.output}
        renamed = {}
        for name in [value.name for value in self.graph.output]:
            source = self.value(name)
            if source == name:
                continue
            if source in self.producers and source not in renamed and source not in outputs | self.captured:
                renamed[source] = name
            else:
                self.add(self.onnx.helper.make_node("Identity", [source], [name]))
        needed = outputs | self.captured
        kept = []
        for node in reversed(self.nodes):
            for names in (node.input, node.output):
                names[:] = [renamed.get(name, name) for name in names]
            if needed.intersection(node.output):
                needed.update(name for name in node.input if name)
                kept.append(node)
        if sum(node.op_type == "Transpose" for node in kept) > sum(
            node.op_type == "Transpose" for node in self.graph.node
        ):
            return
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        # Weights that stay are not copied.
        old = {weight.name for weight in self.graph.initializer}
        for i in reversed(range(len(self.graph.initializer))):
            if self.graph.initializer[i].name not in needed:
                del self.graph.initializer[i]
        new = [weight for name, weight in self.constants.items() if name in needed - old]
        self.graph.initializer.extend(new)


def _captured(node):
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)
            yield from (value.name for value in graph.output)


def _can_reshape(before, after):
    """Whether constant sizes say how to get from one of these shapes to the other."""
    open_sizes = before.count(None), after.count(None)
    return open_sizes in ((0, 0), (1, 1)) and before and after and 0 not in after and _size(before) == _size(after)


def _reorder(before, after, perm):
    """The order of the new axes in which they are a reshaping of a tensor that the old shape is a view of by `perm`.

    None if there is no such order, because a new axis takes its elements from axes that are apart in that tensor.
    """
    # A prime that is no factor of a size stands for the open one.
    olds, news = ([(1 << 61) - 1 if size is None else size for size in shape] for shape in (before, after))
    # Runs of old axes and the runs of new axes that take their place.
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(olds) and j < len(news):
        first = i, j
        left, right = olds[i], news[j]
        while left != right:
            if left < right:
                i += 1
                left *= olds[i]
            else:
                j += 1
                right *= news[j]
        i, j = i + 1, j + 1
        # Repeating elements makes an axis of size 1 behind the one in question.
        while news[j : j + 1] == [1] != olds[i : i + 1]:
            j += 1
        runs.append(([perm[axis] for axis in range(first[0], i)], [*range(first[1], j)]))
    runs[-1][0].extend(perm[i:])
    runs[-1][1].extend(range(j, len(news)))
    sizes = dict(zip(perm, before, strict=True))
    moved = [([axis for axis in old if sizes[axis] != 1], old, new) for old, new in runs]
    moved.sort(key=lambda run: min(run[0] or run[1]))
    order = [axis for wide, _, _ in moved for axis in wide]
    return [axis for _, _, new in moved for axis in new] if order == sorted(order) else None


def _identity(rank):
    return tuple(range(rank))


def _compose(first, second):
    """The permutation that does one after the other."""
    return tuple(first[axis] for axis in second)


def _inverse(perm):
    return tuple(sorted(range(len(perm)), key=perm.__getitem__))


def _size(shape):
    """How many elements, for each of those along open axes."""
    return math.prod(size for size in shape if size is not None)
