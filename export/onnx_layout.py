"""Removes the transposes that a converter puts around channels-first operations in an ONNX graph."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from keras_proxynorm.export.onnx_weights import initializer, value_of

__all__ = ["infer_tensors", "names_read", "remove_transposes"]

# Operations on each element of their first input; the other inputs are scalars.
_UNARY = set(
    str.split(
        "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu "
        "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink "
        "Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
    )
)
# Operations on each element of several inputs that are broadcast to one shape.
_BROADCAST = set(
    str.split(
        "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod "
        "Mul Or PRelu Pow Sub Sum Where Xor"
    )
)
# The axis that each of these takes when it has no such attribute.
_ALONG_AXIS = {"Hardmax": -1, "LogSoftmax": -1, "Softmax": -1, "Split": 0}
_REDUCE = {f"Reduce{kind}" for kind in str.split("L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare")}
_RESHAPE = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}

Permutation = tuple[int, ...]
# Sizes are integers, or None where they are open.
Shape = tuple[int | None, ...]


def remove_transposes(proto, arrays: dict[str, np.ndarray] | None = None) -> None:
    """Rewrites the graph of an `onnx.ModelProto` in place, with as few transposes as possible.

    Transposes are tracked lazily, as views: a base tensor and a permutation. An operation that works in any order of
    the axes is applied to the bases of its inputs, and its result is a view again. Transposes that undo each other
    cancel. A view is computed, once, for the operations that need it; as a Reshape if only axes of size 1 move. Shapes
    that are known become constants. The graph stays as it is if it has fewer transposes, or as many and fewer nodes.

    The results are bitwise equal, but for the order of sums in reductions.

    Args:
        proto: A valid model of opset 13 or later. Graphs inside its nodes are left as they are.
        arrays: The values of its large weights by name, see `onnx_weights`; those of new ones are added.
    """
    _Rewriter(proto, {} if arrays is None else arrays).run()


def infer_tensors(proto) -> list:
    """The result of shape inference on an `onnx.ModelProto`: a list of `onnx.ValueInfoProto`."""
    import onnx

    # Without the values of large weights, because inference takes no more than 2 GB.
    skeleton = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    skeleton.graph.name = proto.graph.name
    skeleton.graph.node.extend(proto.graph.node)
    skeleton.graph.input.extend(proto.graph.input)
    skeleton.graph.output.extend(proto.graph.output)
    skeleton.functions.extend(proto.functions)
    for weight in proto.graph.initializer:
        if math.prod(weight.dims) < 1024:
            skeleton.graph.initializer.append(weight)
        else:
            value = onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
            skeleton.graph.input.append(value)
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    return [*inferred.value_info, *inferred.input, *inferred.output]


def names_read(graph) -> Iterator[str]:
    """The names of what the nodes of a graph read, those in graphs inside of nodes too, and of its outputs."""
    for node in graph.node:
        yield from node.input
        yield from _captured(node)
    yield from (output.name for output in graph.output)


class _Rewriter:
    """The list of nodes that takes the place of a graph's.

    A permutation reads as in Transpose: axis ``i`` of a view is axis ``perm[i]`` of its base.
    """

    def __init__(self, proto, arrays):
        import onnx

        self.onnx = onnx
        self.arrays = arrays
        self.graph = proto.graph
        # tf2onnx does not keep the noted shapes true through its own optimizations.
        del self.graph.value_info[:]
        self.shapes: dict[str, Shape] = {}
        for value in infer_tensors(proto):
            if value.type.tensor_type.HasField("shape"):
                sizes = value.type.tensor_type.shape.dim
                self.shapes[value.name] = tuple(x.dim_value if x.HasField("dim_value") else None for x in sizes)
        self.constants = {weight.name: weight for weight in self.graph.initializer}
        self.shapes.update({name: tuple(weight.dims) for name, weight in self.constants.items()})
        self.nodes: list = []
        self.views: dict[str, tuple[str, Permutation]] = {}
        # The views that the new nodes compute.
        self.computed: dict[tuple[str, Permutation], str] = {}
        # The inputs of the Reshapes among the new nodes.
        self.reshapes: dict[str, str] = {}
        # Graphs inside of nodes refer to tensors outside of them by name.
        self.captured = {name for node in self.graph.node for name in _captured(node)}
        self.names = {*self.shapes, *self.captured, *(name for node in self.graph.node for name in node.output)}
        self.numbers = itertools.count()

    def run(self):
        for value in self.graph.input:
            if value.name not in self.constants and (perm := self.first_transpose(value.name)):
                base, view = self.transposed(value.name, perm), _inverse(perm)
                self.views[value.name], self.computed[base, view] = (base, view), value.name
        for node in self.graph.node:
            names = {*node.input, *node.output} - {""}
            known = node.domain in ("", "ai.onnx") and names <= self.shapes.keys()
            if not known or self.captured.intersection(node.output) or not self.rewrite(node):
                self.copy(node, [self.value(name) for name in node.input], node.output)
        self.finish()

    def first_transpose(self, name) -> Permutation | None:
        """The permutation of the Transpose after a tensor, if nothing is between them that depends on the order."""
        nodes = [node for node in self.graph.node if name in node.input]
        if len(nodes) != 1 or nodes[0].domain not in ("", "ai.onnx"):
            return None
        if nodes[0].op_type == "Transpose":
            return tuple(_attribute(nodes[0], "perm", range(len(self.shapes[name]))[::-1]))
        follows = nodes[0].op_type in _UNARY | _BROADCAST | {"Pad"}
        return self.first_transpose(nodes[0].output[0]) if follows else None

    def rewrite(self, node) -> bool:
        """Adds what takes the place of `node`, or returns False if that is a node with the same inputs."""
        op = node.op_type
        if op in _BROADCAST or op == "Concat":
            return self.join(node)
        if op in _RESHAPE:
            return self.reshape(node.input[0], node.output[0])
        if op == "Transpose":
            base, perm = self.view(node.input[0])
            self.views[node.output[0]] = base, _compose(perm, _attribute(node, "perm", range(len(perm))[::-1]))
            return True
        if not node.input or node.input[0] not in self.views:
            return False
        base, perm = self.views[node.input[0]]
        rest = [self.value(name) for name in node.input[1:]]
        if op in _UNARY:
            return self.follow(node, [base, *rest], perm)
        if op in _ALONG_AXIS:
            return self.follow(node, [base, *rest], perm, axis=perm[_attribute(node, "axis", _ALONG_AXIS[op])])
        if op in _REDUCE:
            return self.reduce(node, base, perm)
        values = [self.array(name) for name in rest]
        if op == "Pad" and values[0] is not None and len(rest) < 3:
            pads = values[0].reshape(2, -1)[:, _inverse(perm)]
            return self.follow(node, [base, self.integers(pads.reshape(-1)), *rest[1:]], perm)
        if op == "Tile" and values[0] is not None:
            return self.follow(node, [base, self.integers(values[0][axis] for axis in _inverse(perm))], perm)
        if op == "Slice" and len(rest) > 2 and values[2] is not None:
            axes = self.constant("axes", values[2].dtype.type([perm[axis] for axis in values[2]]))
            return self.follow(node, [base, *rest[:2], axes, *rest[3:]], perm)
        return False

    def join(self, node) -> bool:
        """An operation on several tensors, in the order of axes of the base of the largest."""
        rank = len(self.shapes[node.output[0]])
        wide = [name for name in node.input if len(self.shapes[name]) == rank and name not in self.constants]
        rest = [name for name in node.input if name not in self.constants and name not in wide]
        if not wide or any(not {1}.issuperset(self.shapes[name]) for name in rest):
            return False
        # Of tensors of the same size a view, because what follows may undo its transpose.
        _, perm = max(map(self.view, wide), key=lambda view: (_size(self.shapes[view[0]]), view[1] != _identity(rank)))
        if perm == _identity(rank):
            return False
        inputs = []
        for name in node.input:
            if name in wide:
                base, own = self.view(name)
                name = self.transposed(base, _compose(own, _inverse(perm)))
            elif name in self.constants:
                value = value_of(self.constants[name], self.arrays)
                value = value.reshape((1,) * (rank - value.ndim) + value.shape)
                name = self.constant(name, value.transpose(_inverse(perm)))
            inputs.append(self.value(name))
        changes = {"axis": perm[_attribute(node, "axis", 0)]} if node.op_type == "Concat" else {}
        return self.follow(node, inputs, perm, **changes)

    def reduce(self, node, base, perm) -> bool:
        axes = self.array(node.input[1]) if len(node.input) > 1 else _attribute(node, "axes", None)
        if axes is None or len(axes) == 0:
            return False
        reduced = sorted(perm[axis] for axis in axes)
        if not _attribute(node, "keepdims", 1):
            left = [axis for axis in range(len(perm)) if axis not in reduced]
            perm = tuple(left.index(axis) for axis in perm if axis in left)
        if len(node.input) > 1:
            return self.follow(node, [base, self.integers(reduced)], perm)
        return self.follow(node, [base], perm, axes=reduced)

    def reshape(self, name, output) -> bool:
        """A change of shape: that of a view is a view if its base can be reshaped instead."""
        before, after = self.shapes[name], self.shapes[output]
        open_sizes = before.count(None), after.count(None)
        if open_sizes not in ((0, 0), (1, 1)) or 0 in after or _size(before) != _size(after):
            return False
        base, perm = self.view(name)
        order = _reorder(before, after, perm)
        if order is None:
            base, order = self.value(name), _identity(len(after))
        self.views[output] = self.reshaped(base, tuple(after[axis] for axis in order)), _inverse(order)
        return True

    def reshaped(self, name, shape) -> str:
        """`name` in a shape with one open size at most."""
        while name in self.reshapes:
            name = self.reshapes[name]
        if self.shapes.get(name) == shape:
            return name
        sizes = self.integers(-1 if size is None else size for size in shape)
        output = self.new_name(name)
        self.reshapes[output] = name
        return self.add(self.onnx.helper.make_node("Reshape", [name, sizes], [output]), shape)

    def transposed(self, base, perm) -> str:
        if perm == _identity(len(perm)):
            return base
        if (base, perm) not in self.computed:
            old = self.shapes[base]
            shape = tuple(old[axis] for axis in perm)
            moved = [axis for axis in perm if old[axis] != 1]
            if moved == sorted(moved) and 0 not in shape and shape.count(None) < 2:
                self.computed[base, perm] = self.reshaped(base, shape)
            else:
                node = self.onnx.helper.make_node("Transpose", [base], [self.new_name(base)], perm=perm)
                self.computed[base, perm] = self.add(node, shape)
        return self.computed[base, perm]

    def follow(self, node, inputs, perm, **changes) -> bool:
        """Adds `node` with other inputs and attributes; its outputs are views of the new outputs by `perm`."""
        outputs = [self.new_name(name) for name in node.output]
        for name, output in zip(node.output, outputs, strict=True):
            self.views[name] = output, perm
            self.shapes[output] = tuple(self.shapes[name][axis] for axis in _inverse(perm))
        self.copy(node, inputs, outputs, **changes)
        return True

    def copy(self, node, inputs, outputs, **changes):
        copied = self.onnx.NodeProto()
        copied.CopyFrom(node)
        copied.input[:], copied.output[:] = inputs, outputs
        for attribute in [attribute for attribute in copied.attribute if attribute.name in changes]:
            copied.attribute.remove(attribute)
        copied.attribute.extend(self.onnx.helper.make_attribute(name, value) for name, value in changes.items())
        self.nodes.append(copied)

    def add(self, node, shape) -> str:
        self.nodes.append(node)
        self.shapes[node.output[0]] = shape
        return node.output[0]

    def view(self, name) -> tuple[str, Permutation]:
        return self.views.get(name) or (name, _identity(len(self.shapes[name])))

    def value(self, name) -> str:
        """The tensor that is `name`, computed."""
        return self.transposed(*self.views[name]) if name in self.views else name

    def array(self, name) -> np.ndarray | None:
        return value_of(self.constants[name], self.arrays) if name in self.constants else None

    def constant(self, name, value) -> str:
        name = self.new_name(name)
        self.constants[name] = initializer(name, value, self.arrays)
        self.shapes[name] = value.shape
        return name

    def integers(self, values: Iterable) -> str:
        return self.constant("axes", np.array([*values], np.int64))

    def new_name(self, like) -> str:
        stem = like.partition("__nchw")[0]
        return next(name for i in self.numbers if (name := f"{stem}__nchw{i}") not in self.names)

    def finish(self):
        """Puts the new nodes that outputs need into the graph, unless it has less to do as it is."""
        outputs = [value.name for value in self.graph.output]
        sources = [self.value(name) for name in outputs]
        made = {name for node in self.nodes for name in node.output} - self.captured.union(outputs)
        renamed: dict[str, str] = {}
        for name, source in zip(outputs, sources, strict=True):
            if source in made - renamed.keys():
                renamed[source] = name
            elif source != name:
                self.nodes.append(self.onnx.helper.make_node("Identity", [source], [name]))
        needed = self.captured.union(outputs)
        kept: list = []
        for node in reversed(self.nodes):
            for names in (node.input, node.output):
                names[:] = [renamed.get(name, name) for name in names]
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.insert(0, node)
        if _cost(kept) <= _cost(self.graph.node):
            old = {weight.name for weight in self.graph.initializer}
            del self.graph.node[:]
            self.graph.node.extend(kept)
            new = needed & self.constants.keys() - old
            self.graph.initializer.extend(weight for name, weight in self.constants.items() if name in new)


def _captured(node) -> Iterator[str]:
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from names_read(graph)


def _attribute(node, name, default) -> Any:
    import onnx

    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default


def _cost(nodes) -> tuple[int, int]:
    return sum(node.op_type == "Transpose" for node in nodes), len(nodes)


def _reorder(before: Shape, after: Shape, perm: Permutation) -> Permutation | None:
    """The order of the new axes of a reshaped view in which they are a reshape of its base, or None.

    Such an order exists unless a new axis takes its elements from axes that are apart in the base.
    """
    old, new = _products(before), _products(after)
    # Old axes become new ones in runs: from one product of sizes that both shapes have to the next.
    runs: dict[int, tuple[list, list, list]] = {product: ([], [], []) for product in {*old} & {*new}}

    def run(product):
        return runs[max(common for common in runs if common <= product)]

    for axis, size in enumerate(before):
        run(old[axis + 1])[size == 1].append(perm[axis])
    for axis in range(len(after)):
        run(new[axis + 1])[2].append(axis)
    ordered = sorted(runs.values(), key=lambda run: min(run[0] or run[1] or [-1]))
    wide = [axis for run in ordered for axis in run[0]]
    return tuple(axis for run in ordered for axis in run[2]) if wide == sorted(wide) else None


def _products(shape: Shape) -> list[int]:
    """The products of all sizes, of all but the first, and so on, to 1."""
    # A prime that is no factor of a size stands for an open one.
    sizes = [(1 << 61) - 1 if size is None else size for size in shape]
    return [math.prod(sizes[axis:]) for axis in range(len(sizes) + 1)]


def _identity(rank: int) -> Permutation:
    return tuple(range(rank))


def _compose(first, second) -> Permutation:
    """The permutation that does one after the other."""
    return tuple(first[axis] for axis in second)


def _inverse(perm) -> Permutation:
    return tuple(sorted(range(len(perm)), key=perm.__getitem__))


def _size(shape: Shape) -> int:
    """How many elements, for each of those along open axes."""
    return math.prod(size for size in shape if size is not None)
