"""The inference form of a model: its normalizations folded into constants, and those into the layers around them."""

import collections
import warnings
from dataclasses import dataclass

import keras

from keras_proxynorm.folding.folded_normalization import FoldedNormalization
from keras_proxynorm.folding.planning import FoldPlan
from keras_proxynorm.folding.planning import make_fold_plan
from keras_proxynorm.graph.carrying import carry_own_weights
from keras_proxynorm.graph.carrying import carry_state
from keras_proxynorm.graph.carrying import dtype_of
from keras_proxynorm.graph.cloning import ModelCloner
from keras_proxynorm.graph.linear_weights import LinearWeights
from keras_proxynorm.graph.reading import check_readable
from keras_proxynorm.graph.reading import nested_model
from keras_proxynorm.graph.reading import read_graphs

__all__ = ["FoldReport", "fold", "fold_if_possible", "fold_with_report"]


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did.

    Attributes:
        folded: What became of each normalization, by its path.
        absorbed: For each linear layer that took something in from normalizations in front of it, by its path: from
            which.

    Example:

    >>> import keras, keras_proxynorm
    >>> from keras_proxynorm.export import fold
    >>> layers = [keras.Input((8,)), keras.layers.Dense(8), keras.layers.BatchNormalization(name="norm")]
    >>> _, report = fold(keras.Sequential(layers), return_report=True)
    >>> print(report)
    1 normalizations folded
        1 BatchNormalization into the layer in front of it
    """

    folded: dict[str, str]
    absorbed: dict[str, tuple[str, ...]]

    def __str__(self):
        lines = [f"{len(self.folded)} normalizations folded"]
        lines += [f"{count:5} {kind}" for kind, count in collections.Counter(self.folded.values()).most_common()]
        return "\n".join(lines)


def fold(model: keras.Model, *, return_report: bool = False):
    """Makes the inference form of a model: the same function, with all that depends on weights alone computed once.

    - The mean and variance of each proxy become constants, computed in float64 and rounded once. Scale, offset and
      proxy normalization of a layer merge; what remains behind the activation, a scale and a shift of each channel,
      goes into the weights of the dense, convolution, depthwise and separable layers that read the output, where that
      is exact: also through pooling, cropping, padding, reshapes, concatenation and products, but no shift into what
      reads zeros of a padding in its place, and none through a product.
    - A `BatchNormalization` goes into the linear layer in front of it, or else into those behind it, or else becomes a
      scale and an offset. So does a layer of `keras_proxynorm.baselines` that is no more than that at inference; one
      that contains a linear layer becomes that, where the kernel at inference is a constant.
    - A `GroupNormalization` keeps its statistics, with scale and offset as constants.

    Normalizations become `FoldedNormalization` layers or, where nothing is left to do, `keras.layers.Identity`. All
    layers keep their names. The source model is not changed. Normalizations inside of other layers, where the graph of
    the model does not lead, stay what they are.

    Args:
        model: A functional or sequential model that is built. Models nested in it are folded, too.
        return_report: If True, return a report, too.

    Returns:
        The folded model, an ordinary Keras model that can be called and saved, with all weights frozen and equal to
        `model` up to rounding. To load it elsewhere, ``import keras_proxynorm.export`` first. With
        ``return_report=True`` also a `FoldReport`, which can be printed.

    Raises:
        ValueError: If the model is not built, if it is neither functional nor sequential, or if a layer cannot be
            cloned, which the message names.

    Example:

    >>> import keras, keras_proxynorm
    >>> from keras_proxynorm.export import fold
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3)])
    >>> model.add(keras_proxynorm.LayerNormProxy(name="norm"))
    >>> model.add(keras.layers.GlobalAveragePooling2D())
    >>> model.add(keras.layers.Dense(10, name="logits"))
    >>> folded, report = fold(model, return_report=True)
    >>> report.absorbed
    {'logits': ('norm',)}
    >>> x = keras.random.normal((1, 8, 8, 3))
    >>> bool(keras.ops.max(keras.ops.abs(folded(x) - model(x))) < 1e-5)
    True

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743)
    """
    folded, report = fold_with_report(model)
    return (folded, report) if return_report else folded


def fold_with_report(model: keras.Model, through_gates: bool = False) -> tuple[keras.Model, FoldReport]:
    """As `fold`.

    Args:
        model: As there.
        through_gates: Whether a shift in front of a squeeze-and-excite gate becomes a small convolution of the gate,
            which is added behind the layer that reads the product. It saves a pass over the larger tensor, where
            starting a small convolution costs less than that.
    """
    check_readable(model)
    graphs = read_graphs(model)
    plan = make_fold_plan(graphs, through_gates)
    cloner = _FoldingCloner(graphs, plan)
    folded = cloner.clone(model)
    for note in cloner.notes:
        warnings.warn(note, stacklevel=4)
    _carry(plan, cloner)
    for graph in graphs:
        if not carry_own_weights(graph.model, cloner.clone(graph.model), graph.functional):
            raise ValueError(
                f"Argument `model` must have its weights in layers of its graph. Received: '{graph.model.name}', which "
                "has others, outside of its graph"
            )
    folded.trainable = False
    return folded, FoldReport(
        folded={folding.path: folding.describe() for folding in plan.foldings.values()}
        | {plan.linear[id(x)]: f"{type(x).__name__} into the layer inside of it" for x in _contained(plan, cloner)},
        absorbed={absorption.path: absorption.rescaling.sources for absorption in plan.absorptions},
    )


def _contained(plan, cloner):
    return [source for source, _ in cloner.clones.values() if id(source) in plan.linear]


def fold_if_possible(model: keras.Model, through_gates: bool = False) -> tuple[keras.Model, str]:
    """The folded model and what was folded, in words; for a model that cannot be folded itself, with a warning."""
    try:
        folded, report = fold_with_report(model, through_gates)
    except ValueError as error:
        warnings.warn(
            f"The model '{model.name}' is exported without folding, as with fold=False, because it cannot be folded: "
            f"{error}",
            stacklevel=3,
        )
        return model, "nothing"
    return folded, str(report)


_BIAS = {"use_bias": True, "bias_initializer": "zeros", "bias_regularizer": None, "bias_constraint": None}


class _FoldingCloner(ModelCloner):
    def __init__(self, graphs, plan: FoldPlan):
        super().__init__(graphs)
        self.shifts: dict[int, keras.layers.Layer] = {}
        self._plan = plan
        self._factors: dict[int, list] = {}

    def _clone_single(self, operation):
        folding = self._plan.foldings.get(id(operation))
        if folding is not None and folding.vanishes:
            return keras.layers.Identity(name=operation.name, dtype=dtype_of(operation))
        if folding is not None:
            return FoldedNormalization(
                groups=folding.groups,
                axis=folding.axis,
                epsilon=folding.epsilon,
                activation=folding.activation,
                constants=list(folding.constants),
                reads_mask=folding.reads_mask,
                name=operation.name,
                dtype=dtype_of(operation),
            )
        if id(operation) in self._plan.linear:
            _, _, activation = operation.inference_linear()
            return super()._clone_single(
                operation.layer, **_BIAS, activation=activation, name=operation.name, dtype=dtype_of(operation)
            )
        if id(operation) in self._plan.changed and not operation.use_bias:
            return super()._clone_single(operation, **_BIAS)
        return super()._clone_single(operation)

    def _call(self, clone, *args, **kwargs):
        source = self._sources[id(clone)]
        if id(source) in self._plan.foldings or id(source) in self._plan.linear:
            return self._call_replacement(source, clone, *args, **kwargs)
        outputs = clone(*args, **kwargs)
        if isinstance(source, keras.layers.Multiply):
            self._factors[id(source)] = args[0]
        gated = self._plan.gated.get(id(source))
        if gated is None:
            return outputs
        # The weights of it are set when those of all layers are.
        shift = type(source)(
            source.filters,
            1,
            data_format=source.data_format,
            use_bias=False,
            name=f"{source.name}_shift",
            dtype=dtype_of(source),
        )
        self.shifts[id(source)] = shift
        add = keras.layers.Add(name=f"{source.name}_shifted", dtype=dtype_of(source))
        return add([outputs, shift(self._factors[id(gated.product)][gated.gate])])


def _carry(plan: FoldPlan, cloner: _FoldingCloner):
    """Sets the weights of all layers of the folded model."""
    in_front = {id(folding.linear): folding for folding in plan.foldings.values() if folding.linear is not None}
    for source, clone in cloner.clones.values():
        if id(source) in plan.foldings:
            if isinstance(clone, FoldedNormalization):
                for name, vector in plan.foldings[id(source)].constants.items():
                    getattr(clone, name).assign(vector)
        elif id(source) in plan.linear:
            kernel, bias, _ = source.inference_linear()
            clone.kernel.assign(kernel)
            clone.bias.assign(bias)
        elif id(source) in plan.changed:
            weights = LinearWeights(source)
            gated = plan.gated.get(id(source))
            response = gated and weights.response(gated.rescaling.values()[1])
            for absorption in plan.absorptions:
                if absorption.layer is source:
                    weights.take_in(*absorption.rescaling.values())
            if id(source) in in_front:
                weights.rescale_output(in_front[id(source)].scale, in_front[id(source)].offset)
                response = gated and response * in_front[id(source)].scale
            weights.assign(clone)
            if gated:
                cloner.shifts[id(source)].kernel.assign(response)
        elif isinstance(source, keras.layers.Layer) and nested_model(source) is None:
            carry_state(source, clone)
