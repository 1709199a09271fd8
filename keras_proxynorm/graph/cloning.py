"""Builds a new model: clones every layer, puts replacements in, and lets absorbed activations vanish."""

import inspect
from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_proxynorm.graph.carrying import dtype_of
from keras_proxynorm.graph.reading import Graph
from keras_proxynorm.graph.reading import cannot_clone
from keras_proxynorm.graph.reading import is_functional
from keras_proxynorm.graph.reading import is_sequential
from keras_proxynorm.graph.reading import nested_model
from keras_proxynorm.surgery.planning import Decision
from keras_proxynorm.surgery.planning import Plan

__all__ = ["Cloner", "ModelCloner"]


class ModelCloner:
    """Clones a functional or sequential model, with the models nested in it, once.

    Subclasses put other layers in the place of some.

    Args:
        graphs: The graphs of the model, from `read_graphs`.

    Attributes:
        clones: The clone of each operation, by its `id`: a pair of both.
        notes: What did not come through.
    """

    def __init__(self, graphs: Iterable[Graph]):
        self.clones: dict[int, tuple] = {}
        self.notes: list[str] = []
        self._graphs = {id(graph.model): graph for graph in graphs}
        self._sources: dict[int, keras.Operation] = {}

    def clone(self, operation):
        """The clone of a model, a layer or a function of keras.ops; always the same one."""
        if id(operation) not in self.clones:
            clone = self._clone(operation)
            self.clones[id(operation)] = (operation, clone)
            self._sources[id(clone)] = operation
        return self.clones[id(operation)][1]

    def _clone(self, operation):
        if is_functional(operation):
            return self._clone_functional(operation)
        if is_sequential(operation):
            return self._clone_sequential(operation)
        nested = nested_model(operation)
        if nested is not None:
            return type(operation)(self.clone(nested), name=operation.name, dtype=dtype_of(operation))
        return self._clone_single(operation)

    def _clone_single(self, operation, **config):
        """The clone of a layer or of a function of keras.ops, with some arguments of its config changed."""
        if isinstance(operation, keras.layers.Lambda):
            return _clone_lambda(operation)
        try:
            return type(operation).from_config({**operation.get_config(), **config})
        except Exception as error:  # get_config and from_config are the user's
            raise cannot_clone(operation, error) from error

    def _clone_functional(self, model):
        graph = self._graphs[id(model)]
        operations = {operation.name: operation for operation in graph.functional.operations}
        # Cloned from their configs, because clone_model would rename inputs that have no name of their own.
        inputs = [keras.layers.InputLayer.from_config(operations[name].get_config()).output for name in graph.inputs]
        clone = keras.models.clone_model(
            graph.functional,
            input_tensors=keras.tree.pack_sequence_as(model.input, inputs),
            clone_function=self.clone,
            call_function=self._call,
        )
        if type(model) is type(graph.functional):
            return self._finish(model, clone)
        if _has_functional_constructor(type(model)):
            return self._finish(model, type(model)(clone.input, clone.output, name=model.name))
        self._note_class(model, "functional keras.Model")
        return self._finish(model, clone)

    def _clone_sequential(self, model):
        graph = self._graphs[id(model)]
        config = graph.functional.get_layer(graph.inputs[0]).get_config()
        if type(model) is not keras.Sequential:
            self._note_class(model, "keras.Sequential")
        layers = [keras.layers.InputLayer.from_config(config), *self._sequential_layers(model, graph)]
        return self._finish(model, keras.Sequential(layers, name=model.name))

    def _sequential_layers(self, model, graph) -> list:
        return [self.clone(layer) for layer in model.layers]

    def _finish(self, model, clone):
        # The global policy is not that under which the model was made, and decides about loss scaling in `compile`.
        clone.dtype_policy = model.dtype_policy
        return clone

    def _note_class(self, model, instead):
        self.notes.append(
            f"Model '{model.name}' is a {type(model).__name__}; its replacement is a {instead} of the same graph, "
            "without the methods and attributes of that class."
        )

    def _call(self, clone, *args, **kwargs):
        """Calls a clone with what its source was called with."""
        return clone(*args, **kwargs)

    def _call_replacement(self, source, clone, *args, **kwargs):
        """Calls a layer of another kind, with those arguments of the call of `source` that it knows."""
        arguments = inspect.signature(source.call).bind(*args, **kwargs).arguments
        (_, inputs), *others = arguments.items()
        # The calls of BatchNormalization carry `training` and `mask`, which other layers need not know.
        taken = inspect.signature(clone.call).parameters
        kwargs = {key: value for key, value in others if key in taken and value is not None}
        return clone(inputs, **kwargs)


class Cloner(ModelCloner):
    """Clones the model of a plan, with other normalizations in it.

    Args:
        plan: From `make_plan`.
        make: Makes the layer with the activation, or the one without, for a decision.
        configs: Changes to the configs of layers that are cloned, by the `id` of the layer.

    Attributes:
        clones: For a normalization that is replaced, what stands in its place; for one that is split, the layer
            without activation.
        activated: The layers with the activation of normalizations that are fused or split, by their `id`.
    """

    def __init__(self, plan: Plan, make: Callable[[Decision, bool], keras.layers.Layer], configs: dict[int, dict]):
        super().__init__(plan.graphs)
        self.activated: dict[int, keras.layers.Layer] = {}
        self._plan = plan
        self._make = make
        self._configs = configs
        # By the id of the tensor in front of activations that vanish: the normalization, and with what it was called.
        self._in_front: dict[int, tuple] = {}
        self._activated_outputs_of: dict[int, keras.KerasTensor] = {}

    def replacements(self, normalization: keras.layers.Layer) -> list[keras.layers.Layer]:
        """The layers in the place of a normalization that is replaced: the one with the activation comes first."""
        layers = [self.activated.get(id(normalization)), self.clone(normalization)]
        return [layer for index, layer in enumerate(layers) if layer is not None and layer not in layers[:index]]

    def _clone_single(self, operation):
        decision = self._plan.decisions.get(id(operation))
        if decision is not None and decision.is_replaced:
            if decision.has_activated:
                self.activated[id(operation)] = self._make(decision, True)
            return self._make(decision, False) if decision.has_plain else self.activated[id(operation)]
        if id(operation) in self._plan.vanishing:
            # It is called only where an output has its name.
            decision = self._plan.vanishing[id(operation)]
            return keras.layers.Identity(name=operation.name, dtype=dtype_of(decision.outermost))
        return super()._clone_single(operation, **self._configs.get(id(operation), {}))

    def _sequential_layers(self, model, graph):
        layers: list = []
        for source in model.layers:
            if id(source) in self._plan.contained:
                continue
            (call,) = graph.calls_of(source)
            decision = self._plan.absorbing(graph, call)
            clone = self.clone(source)
            if decision is not None:
                layers[-1] = self.activated[id(decision.layer)]
            if decision is None or self._plan.is_renamed_output(source):
                layers.append(clone)
        return layers

    def _call(self, clone, *args, **kwargs):
        source = self._sources[id(clone)]
        if id(source) in self._plan.contained:
            # The layer behind it does what it did, too.
            return args[0]
        for tensor in keras.tree.flatten((args, kwargs)):
            if id(tensor) in self._in_front:
                decision = self._in_front[id(tensor)][1]
                if any(operation is source for operation in decision.absorbed):
                    outputs = self._activated_outputs(tensor)
                    return clone(outputs) if self._plan.is_renamed_output(source) else outputs
        decision = self._plan.decisions.get(id(source))
        if decision is None or not decision.is_replaced:
            return clone(*args, **kwargs)
        outputs = self._call_replacement(source, clone, *args, **kwargs)
        if decision.has_activated:
            self._in_front[id(outputs)] = (outputs, decision, source, args, kwargs)
        return outputs

    def _activated_outputs(self, tensor):
        """The tensor behind the activations that vanish and read `tensor`."""
        _, decision, source, args, kwargs = self._in_front[id(tensor)]
        if not decision.has_plain:
            return tensor
        if id(tensor) not in self._activated_outputs_of:
            activated = self.activated[id(decision.layer)]
            self._activated_outputs_of[id(tensor)] = self._call_replacement(source, activated, *args, **kwargs)
        return self._activated_outputs_of[id(tensor)]


def _clone_lambda(layer):
    # Its config holds the bytecode of the function without the globals that it needs.
    return keras.layers.Lambda(
        layer.function,
        output_shape=layer._output_shape,
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=dtype_of(layer),
    )


def _has_functional_constructor(cls):
    spec = inspect.getfullargspec(cls.__init__)
    passes_on = spec.varargs is not None and spec.varkw is not None
    return not spec.kwonlyargs and (spec.args[1:] == ["inputs", "outputs", "name"] or passes_on)
