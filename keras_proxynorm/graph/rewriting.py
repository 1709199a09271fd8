"""Clones a model with some of its operations rewritten: the one way in which the package changes models."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras

from keras_proxynorm.compat import lambda_output_shape
from keras_proxynorm.graph.carrying import cannot_clone, carry_own_weights, carry_state, dtype_of, has_late_regularizers
from keras_proxynorm.graph.reading import Call, Graph, is_sequential, nested_model

__all__ = ["Clone", "Rewrite", "clone", "clone_layer"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rewrite:
    """What becomes of one operation.

    Attributes:
        source: The operation. Each of its calls becomes a call of the new layer, with the same arguments, as far as the
            new layer knows them.
        make: Makes the new layer; it is called once.
        carry: Sets the weights of the new layer, and what of them is trainable: a function of the old operation and the
            new layer. It returns notes about what could not be carried.
        absorbs: Calls that read `source` and vanish into the new layer: its output takes the place of theirs.
        preceding: The operation before `source` that vanishes into the new layer, which reads what that one reads; or
            None.
        reads: Further tensors of the old model, on which `source` depends. Their counterparts are passed to `call`.
        call: How the new layer is called, if it is more than one layer: a function of the new layer, a tuple for
            `reads`, and the arguments of the call. Defaults to a call of the new layer.
    """

    source: keras.Operation
    make: Callable[[], Any]
    carry: Callable[[Any, Any], Sequence[str]]
    absorbs: tuple[Call, ...] = ()
    preceding: keras.Operation | None = None
    reads: tuple[keras.KerasTensor, ...] = ()
    call: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Clone:
    """A model that was cloned.

    Attributes:
        model: The new model.
        replaced: The new layers by the old operation that was rewritten, in the order of the rewrites.
        layers: The clone of each other operation by the old one, nested models included.
        notes: What did not come through.
    """

    model: keras.Model
    replaced: dict[keras.Operation, tuple[Any, ...]]
    layers: dict[keras.Operation, Any]
    notes: list[str]

    def counterpart(self, operation: keras.Operation) -> Any:
        """The new layer in the place of an operation of the old model; of several the first."""
        return self.replaced[operation][0] if operation in self.replaced else self.layers[operation]


def clone(graphs: Sequence[Graph], rewrites: Iterable[Rewrite] = (), weights: bool = True) -> Clone:
    """Clones a functional or sequential model, with the models nested in it.

    Args:
        graphs: The graphs of the model, from `read_graphs`.
        rewrites: What becomes of some operations; the others are cloned. An operation has several rewrites if its
            output is read in several ways: consumers that no rewrite absorbs read the one that absorbs none.
        weights: Whether weights are copied; what `carry` of a rewrite does is up to that.

    Returns:
        The `Clone`.

    Raises:
        ValueError: If a layer cannot be made from its config, which the message names.
    """
    cloner = _Cloner(graphs, rewrites)
    model = cloner.clone(graphs[0].model)
    return Clone(model, cloner.replaced, cloner.clones, [*cloner.notes, *_carry(graphs, cloner, weights)])


def clone_layer(layer: keras.Operation, **config: Any) -> Any:
    """The clone of a layer or of a function of `keras.ops`, with some arguments of its config changed."""
    if isinstance(layer, keras.layers.Lambda):
        return _clone_lambda(layer)
    try:
        new = type(layer).from_config({**layer.get_config(), **config})
    except Exception as error:  # get_config and from_config are the user's
        raise cannot_clone(layer, error) from error
    # Configs of custom classes may lack it, and outputs have the names of layers.
    new.name = config.get("name", layer.name)
    return new


class _Cloner:
    """Clones each operation once, and runs each graph with the clones."""

    def __init__(self, graphs, rewrites):
        self.graphs = {id(graph.model): graph for graph in graphs}
        self.rewrites: dict[keras.Operation, list[Rewrite]] = {}
        for rewrite in rewrites:
            self.rewrites.setdefault(rewrite.source, []).append(rewrite)
        every = [rewrite for several in self.rewrites.values() for rewrite in several]
        # The rewrites that absorb calls, and the operations that vanish into the one that reads them.
        self.absorbing = {call: rewrite for rewrite in every for call in rewrite.absorbs}
        self.preceding = {rewrite.preceding for rewrite in every if rewrite.preceding is not None}
        self.replaced: dict[keras.Operation, tuple[Any, ...]] = {}
        self.clones: dict[keras.Operation, Any] = {}
        self.notes: list[str] = []

    def clone(self, operation):
        """The clone of an operation that is not rewritten; always the same one."""
        if operation not in self.clones:
            if id(operation) in self.graphs:
                make = self.clone_sequential if is_sequential(operation) else self.clone_functional
                self.clones[operation] = make(operation)
            elif (nested := nested_model(operation)) is not None:
                wrapper = type(operation)
                self.clones[operation] = wrapper(self.clone(nested), name=operation.name, dtype=dtype_of(operation))
            else:
                self.clones[operation] = clone_layer(operation)
        return self.clones[operation]

    def new_layers(self, source):
        """The layers that an operation becomes, one for each of its rewrites."""
        if source not in self.replaced:
            self.replaced[source] = tuple(rewrite.make() for rewrite in self.rewrites[source])
        return self.replaced[source]

    def clone_functional(self, model):
        graph = self.graphs[id(model)]
        # Input layers are made from their configs, so that those without a name of their own keep it.
        made = {
            operation.output: keras.layers.InputLayer.from_config(operation.get_config()).output
            for operation in graph.operations
            if isinstance(operation, keras.layers.InputLayer)
        }
        values = self.run(graph, made)
        structures = graph.functional.input, graph.functional.output
        inputs, outputs = (keras.tree.map_structure(lambda tensor: values[tensor], x) for x in structures)
        cls = type(model)
        if cls is not type(graph.functional) and not _has_functional_constructor(cls):
            self.note_class(model, "functional keras.Model")
            cls = keras.Model
        return self.finish(model, cls(inputs, outputs, name=model.name))

    def clone_sequential(self, model):
        graph = self.graphs[id(model)]
        calls = {call.operation: call for call in graph.calls}
        layers = [keras.layers.InputLayer.from_config(graph.functional.layers[0].get_config())]
        for layer in model.layers:
            if layer in self.rewrites:
                layers.extend(self.new_layers(layer))
            elif layer not in self.preceding and calls[layer] not in self.absorbing:
                layers.append(self.clone(layer))
        if type(model) is not keras.Sequential:
            self.note_class(model, "keras.Sequential")
        return self.finish(model, keras.Sequential(layers, name=model.name))

    def finish(self, model, clone):
        # The global policy is not that under which the model was made, and decides about loss scaling in `compile`.
        clone.dtype_policy = model.dtype_policy
        return clone

    def note_class(self, model, instead):
        self.notes.append(
            f"Model '{model.name}' is a {type(model).__name__}; its replacement is a {instead} of the same graph, "
            "without the methods and attributes of that class."
        )

    def run(self, graph, values):
        """Calls the clones of all operations of a graph; returns the new tensors by the old ones.

        Args:
            graph: The graph.
            values: The new inputs by the old ones.
        """
        values = dict(values)
        # The outputs of rewritten calls, one for each rewrite.
        results: dict[tuple[keras.KerasTensor, Rewrite], Any] = {}
        for call in graph.calls:
            outputs = self.outputs_of(call, values, results)
            values.update(zip(call.outputs, keras.tree.flatten(outputs), strict=True))
        return values

    def outputs_of(self, call, values, results):
        """What takes the place of the outputs of a call."""
        operation = call.operation
        if call in self.absorbing:
            output = results[call.inputs[0], self.absorbing[call]]
            return self.new_layers(operation)[0](output) if operation in self.rewrites else output
        if operation in self.preceding:
            return values[call.inputs[0]]
        if operation not in self.rewrites:
            return self.clone(operation)(*_new(values, call.args), **_new(values, call.kwargs))
        rewrites = self.rewrites[operation]
        for rewrite, layer in zip(rewrites, self.new_layers(operation), strict=True):
            args, kwargs = (_new(values, arguments) for arguments in _arguments_for(call, layer))
            if rewrite.call is None:
                results[call.output, rewrite] = layer(*args, **kwargs)
            else:
                results[call.output, rewrite] = rewrite.call(layer, _new(values, rewrite.reads), *args, **kwargs)
        # What is not absorbed reads the rewrite that absorbs nothing; if there is none, nothing is left to read it.
        default = next((rewrite for rewrite in rewrites if not rewrite.absorbs), rewrites[0])
        return results[call.output, default]


def _new(values, structure):
    """The new tensors in the place of the old ones in a structure of arguments."""
    return keras.tree.map_structure(lambda x: values[x] if isinstance(x, keras.KerasTensor) else x, structure)


def _arguments_for(call: Call, layer: Any):
    """The arguments of a call for a layer of another kind: its inputs, and what else that layer knows."""
    if type(layer) is type(call.operation) or not isinstance(layer, keras.layers.Layer):
        return call.args, call.kwargs
    (_, inputs), *others = call.arguments.items()
    known = inspect.signature(layer.call).parameters
    return (inputs,), {name: value for name, value in others if name in known and value is not None}


def _carry(graphs, cloner, weights) -> list[str]:
    """Carries the state of all operations over; returns what did not come through."""
    notes = []
    functional_models = {id(graph.model): graph.functional for graph in graphs}
    # Outermost first, and before the layers: freezing a model freezes all that is in it.
    for source, new in reversed(cloner.clones.items()):
        if nested_model(source) is not None:
            new.trainable = source.trainable
            functional = functional_models.get(id(source))
            if functional is not None and not carry_own_weights(source, new, functional, weights):
                notes.append(f"The weights that model '{source.name}' has outside its graph did not come through.")
    late = []
    for source, new in cloner.clones.items():
        if isinstance(source, keras.layers.Layer) and nested_model(source) is None:
            carry_state(source, new, weights)
            if has_late_regularizers(source, new):
                late.append(source.name)
    for source, layers in cloner.replaced.items():
        for rewrite, layer in zip(cloner.rewrites[source], layers, strict=True):
            notes.extend(rewrite.carry(source, layer))
            if all(isinstance(x, keras.layers.Layer) for x in (source, layer)) and has_late_regularizers(source, layer):
                late.append(source.name)
    if late:
        notes.append(
            f"The regularizers of the layers {late} were set after these were built. In the old model they do nothing "
            "until it is saved and loaded; in the new one they take effect."
        )
    return notes


def _clone_lambda(layer):
    # Its config holds the bytecode of the function without the globals that it needs.
    return keras.layers.Lambda(
        layer.function,
        output_shape=lambda_output_shape(layer),
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=dtype_of(layer),
    )


def _has_functional_constructor(cls):
    spec = inspect.getfullargspec(cls.__init__)
    passes_on = spec.args[1:] == [] and spec.varargs is not None and spec.varkw is not None
    return not spec.kwonlyargs and (spec.args[1:] == ["inputs", "outputs", "name"] or passes_on)
