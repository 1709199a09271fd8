"""Puts other normalizations into a model that exists: the one public function of the surgery."""

import collections
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any
from typing import Literal

import keras

from keras_proxynorm.arguments import as_positive_integer
from keras_proxynorm.baselines import BatchGroupNormalization
from keras_proxynorm.graph.activation_nodes import describe_activation
from keras_proxynorm.graph.carrying import carry_by_name
from keras_proxynorm.graph.carrying import carry_compile_state
from keras_proxynorm.graph.carrying import carry_group_statistics
from keras_proxynorm.graph.carrying import carry_own_weights
from keras_proxynorm.graph.carrying import carry_state
from keras_proxynorm.graph.carrying import dtype_of
from keras_proxynorm.graph.carrying import late_regularizers
from keras_proxynorm.graph.cloning import Cloner
from keras_proxynorm.graph.reading import check_readable
from keras_proxynorm.graph.reading import nested_model
from keras_proxynorm.graph.reading import read_graphs
from keras_proxynorm.graph.rescaling import Absorption
from keras_proxynorm.observation.calls import check_batch
from keras_proxynorm.surgery.calibration import calibrate_layers
from keras_proxynorm.surgery.calibration import can_calibrate
from keras_proxynorm.surgery.calibration import channel_moments_of_outputs
from keras_proxynorm.surgery.calibration import set_affine
from keras_proxynorm.surgery.compensation import compensate_in
from keras_proxynorm.surgery.compensation import find_compensations
from keras_proxynorm.surgery.planning import Decision
from keras_proxynorm.surgery.planning import Plan
from keras_proxynorm.surgery.planning import channel_axis
from keras_proxynorm.surgery.planning import make_plan
from keras_proxynorm.surgery.report import LayerReport
from keras_proxynorm.surgery.report import ReplacementReport
from keras_proxynorm.surgery.report import Uncompensated
from keras_proxynorm.surgery.selection import LayerSelection
from keras_proxynorm.surgery.selection import selector
from keras_proxynorm.surgery.targets import Target
from keras_proxynorm.surgery.targets import choose_groups

__all__ = ["replace_normalization"]


def replace_normalization(
    model: keras.Model,
    to: str | Callable[..., keras.layers.Layer] = "group_norm_proxy",
    *,
    groups: int = 32,
    min_channels_per_group: int = 4,
    weights: Literal["copy", "fresh"] = "copy",
    compensate: bool = False,
    calibrate: Any = None,
    center: bool | None = None,
    layers: LayerSelection = None,
    return_report: bool = False,
    **layer_kwargs,
):
    """Makes a copy of a model with other normalization layers in it, by default group norm with proxy normalization.

    A normalization whose output is read by one activation, or by several equal ones, becomes one layer together with
    that activation, which vanishes; the new layer has the activation's name. Any other becomes a layer without
    activation, that is the plain norm. Where its output is read both ways, it becomes one layer of each kind.
    Everything else is cloned, nested models included. The source model is not changed.

    Args:
        model: A functional or sequential model that is built, such as one of `keras.applications` or one loaded from a
            `.keras` file. Models nested in it are converted, too.
        to: What to put in the place of the normalizations. ``"group_norm_proxy"`` or ``"layer_norm_proxy"``; without
            proxy normalization and with the activations where they were, ``"group_norm"``
            (`keras.layers.GroupNormalization`), ``"layer_norm"`` and ``"instance_norm"`` (the same with one group, and
            with one for each channel); or one of `keras_proxynorm.baselines`: ``"ghost_batch_norm"``,
            ``"instance_enhancement_batch_norm"``, ``"batch_group_norm"``, ``"variance_norm"``;
            ``"filter_response_norm"``, ``"evonorm_s0"`` and ``"evonorm_b0"``, whose own nonlinearity takes the place of
            the activation; ``"cross_iteration_batch_norm"``, ``"conv_norm"``, ``"weight_standardization"`` and
            ``"weight_normalization"``, which contain the dense or convolution layer in front. Or a function that makes
            a layer. It is called with those of these keyword arguments that it names: `activation`, `channels`,
            `groups`, `axis`, `epsilon`, `momentum`, `center`, `scale`, and `_initializer`, `_regularizer` and
            `_constraint` of `beta` and `gamma`; `layer`, the linear layer in front, without bias; and with `name` and
            `dtype`, which it must hand on. If it does not name `activation`, activations stay where they are. If it
            names `layer`, normalizations that nothing else than one linear layer feeds are replaced, together with
            that, and the others left alone. A class of layers is such a function.
        groups: The largest number of groups. A layer gets the largest divisor of its number of channels that is not
            larger and leaves `min_channels_per_group` in each group; 1 if there is none. A `GroupNormalization` keeps
            its own.
        min_channels_per_group: The smallest number of channels in a group, unless it is all of them.
        weights: ``"copy"`` carries all weights over, of normalizations those that mean the same: `gamma` and `beta`,
            and moving statistics into what has such. ``"fresh"`` initializes all of them, except what preprocessing
            layers have adapted to.
        compensate: Proxy normalization rescales and shifts what the next layers read. If True, the kernels and biases
            of the layers that read it take that back, so that copied weights mean what they meant. That is exact, and
            done, for dense layers and for convolutions with 1x1 kernels or ``"valid"`` padding, also behind pooling,
            cropping, flattening, dropout (at inference) and concatenation. Layers without bias get one. The report says
            where it was not possible; there, weights stay as they are. Regularizers and constraints of kernels see the
            new values.
        calibrate: A batch of inputs, as for a call of the model: an array of some dozen samples of the data that the
            new model is for, or what else the model takes. On these the new model then does, channel by channel, what
            the old one does: scales and offsets are set so that the input of each activation has the mean and the
            standard deviation that it has in the old model, and proxies to those of the normalized input. Implies
            `compensate`, which then also takes back what it can only nearly: behind zero padding, but for the border,
            and behind gates, but for the offset. For group, layer and instance norm, with or without proxies.
        center: Whether layers without activation have an offset. By default they have one where weights are copied;
            with fresh weights they have one where an activation follows later, as behind the sum in a ResNet, and none
            elsewhere, as in the paper. An offset that was not there is never added by default.
        layers: Which layers to replace: layers, names (alone or with the models they are nested in, such as
            ``"backbone/conv1_bn"``), classes, several of these, or a function of a layer. By default every
            `BatchNormalization`. A `LayerNormalization` or `GroupNormalization` that is asked for is replaced if it
            feeds one activation, or if the new layers do not contain activations. Mind that a `LayerNormalization`
            has statistics for each position, and what replaces it has not.
        return_report: If True, return the report, too.
        **layer_kwargs: Further arguments of the new layers, such as `epsilon`, `scale` or `proxy_epsilon`. By default
            the `epsilon`, `momentum`, `scale`, initializers, regularizers and constraints of the old ones are kept.

    Returns:
        The new model, of the class of the old one if that is made of inputs and outputs. With ``return_report=True``
        also a `keras_proxynorm.surgery.ReplacementReport`, which can be printed.

        - Names of layers stay, except those of fused normalizations. So do names and structure of inputs and outputs.
        - Frozen layers stay frozen. The layer in the place of a frozen normalization is frozen as a whole, with its
          proxy, which is then N(0, 1), until `trainable` is set.
        - If the model was compiled, so is the new one, with a fresh optimizer.
        - A dtype policy stays with its layer; a fused layer has that of the activation.
        - Random seeds of dropout and the like start anew.

    Raises:
        ValueError: For bad arguments; for a model that is not built, or is neither functional nor sequential; and for
            a layer that cannot be cloned, which the message names.

    Warns:
        UserWarning: If nothing was replaced, and about all that did not come through: batch normalizations inside
            other layers, custom classes of models, regularizers that were set after `build`, custom losses.

    Example:

    >>> import keras, keras_proxynorm
    >>> source = keras.applications.MobileNetV2(input_shape=(64, 64, 3), weights=None, classes=10)
    >>> model, report = keras_proxynorm.replace_normalization(source, return_report=True)
    >>> report.count("fused"), report.count("plain"), report.count("left alone")
    (35, 17, 0)
    >>> model.get_layer("Conv1_relu")
    <GroupNormProxy name=Conv1_relu, built=True>

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743)
    """
    check_readable(model)
    groups = as_positive_integer("groups", groups)
    min_channels_per_group = as_positive_integer("min_channels_per_group", min_channels_per_group)
    if weights not in ("copy", "fresh"):
        raise ValueError(f"Argument `weights` must be 'copy' or 'fresh'. Received: weights={weights!r}")
    if center not in (None, True, False):
        raise ValueError(f"Argument `center` must be None, True or False. Received: center={center!r}")
    copies = weights == "copy"
    target = Target(to, layer_kwargs)
    graphs = read_graphs(model)
    plan = make_plan(graphs, selector(layers, graphs), target)

    def make(decision: Decision, with_activation: bool):
        own_groups = getattr(decision.layer, "groups", None)
        arguments = _arguments(decision, with_activation, center, copies)
        arguments["groups"] = own_groups or choose_groups(decision.channels, groups, min_channels_per_group)
        if decision.linear is not None:
            arguments["layer"] = cloner.clone(decision.linear)
        layer = target.make(arguments)
        layer.activity_regularizer = _activity_regularizer(decision, with_activation)
        return layer

    compensations: list[Absorption] = []
    uncompensated: list[Uncompensated] = []
    if calibrate is not None:
        compensate = _check_calibrate(copies, target, plan, make)
    if compensate:
        _check_compensate(compensate, copies, target, plan, make)
        compensations, uncompensated = find_compensations(
            plan, lambda layer: cloner.activated[id(layer)], approximate=calibrate is not None
        )
    # Layers that have no bias get one. What a layer says about the bias that it has not was never meant to act.
    bias = {"use_bias": True, "bias_initializer": "zeros", "bias_regularizer": None, "bias_constraint": None}
    changed = {id(x.layer): bias for x in compensations if not x.layer.use_bias}
    # The offset of the layer that contains them is its own.
    changed |= {key: {"use_bias": False} for key in plan.contained}
    cloner = Cloner(plan, make, changed)
    new_model = cloner.clone(model)

    notes = [*cloner.notes, *_hidden(plan), *_shared_inside(plan), *_frozen_with(plan)]
    notes += _carry(plan, cloner, set(changed), copies)
    wanted = [] if calibrate is None else _wanted_moments(plan, cloner, calibrate)
    for layer, moments in wanted:
        set_affine(layer, *moments)
    for compensation in compensations:
        compensate_in(cloner.clone(compensation.layer), compensation)
    if wanted:
        calibrate_layers(new_model, wanted, calibrate)
    notes += _late_regularizers(cloner)
    notes += carry_compile_state(model, new_model)
    calibrated = {id(layer) for layer, _ in wanted}
    layer_reports = tuple(_layer_report(decision, cloner, copies, calibrated) for decision in plan.decisions.values())
    if not any(decision.is_replaced for decision in plan.decisions.values()):
        notes.append(_nothing_replaced(model, layer_reports))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    report = ReplacementReport(
        model=model.name,
        to=target.name,
        layers=layer_reports,
        hidden=plan.hidden,
        parameters_before=model.count_params(),
        parameters_after=new_model.count_params(),
        compensated={compensation.path: compensation.rescaling.sources for compensation in compensations},
        uncompensated=tuple(uncompensated),
        warnings=tuple(notes),
    )
    return (new_model, report) if return_report else new_model


_CARRIED_ARGUMENTS = [
    "epsilon",
    "momentum",
    "scale",
    *(f"{weight}_{kind}" for weight in ("beta", "gamma") for kind in ("initializer", "regularizer", "constraint")),
]


def _arguments(decision, with_activation, center, copies):
    """What a factory is offered for the layer with the activation, or for the one without."""
    layer = decision.layer
    config = {**vars(layer), **layer.get_config()}
    if center is None:
        center = layer.center and (copies or decision.activation_follows)
    return {
        **{key: config[key] for key in _CARRIED_ARGUMENTS if key in config},
        "axis": channel_axis(layer),
        "center": layer.center if with_activation else center,
        "channels": decision.channels,
        "activation": decision.activation if with_activation else None,
        "name": decision.name if with_activation else layer.name,
        "dtype": dtype_of(decision.outermost if with_activation else layer),
    }


def _activity_regularizer(decision, with_activation):
    layers = decision.absorbed if with_activation else [decision.layer]
    regularizers = [getattr(layer, "activity_regularizer", None) for layer in layers]
    return next((regularizer for regularizer in regularizers if regularizer is not None), None)


def _check_compensate(compensate, copies, target, plan: Plan, make):
    if not isinstance(compensate, bool):
        raise ValueError(f"Argument `compensate` must be True or False. Received: compensate={compensate!r}")
    if not copies:
        raise ValueError(
            "Argument `compensate` keeps the meaning of copied weights, so it needs weights='copy'. "
            "Received: compensate=True, weights='fresh'"
        )
    activated = next((make(decision, True) for decision in plan.decisions.values() if decision.has_activated), None)
    if not target.fuses or (activated is not None and not hasattr(activated, "activation_moments")):
        raise ValueError(
            "Argument `compensate` undoes proxy normalization, so it needs layers that have it, with the method "
            f"`activation_moments`. Received: compensate=True, to={target.name!r}"
        )


def _check_calibrate(copies, target, plan: Plan, make):
    """Whether there is something to compensate for."""
    if not copies:
        raise ValueError(
            "Argument `calibrate` makes the new model do what the old one does, so it needs weights='copy'. "
            "Received: weights='fresh'"
        )
    for decision in (decision for decision in plan.decisions.values() if decision.is_replaced):
        if target.contains_linear or not can_calibrate(make(decision, decision.has_activated)):
            raise ValueError(
                "Argument `calibrate` is for group, layer and instance norm, with or without proxy normalization. "
                f"Received: to={target.name!r}"
            )
    return target.fuses


def _wanted_moments(plan: Plan, cloner: Cloner, data):
    """Pairs of the new layers and the moments of the outputs of the old ones."""
    replaced = [decision.layer for decision in plan.decisions.values() if decision.is_replaced]
    model = plan.graphs[0].model
    with check_batch("calibrate", model, data):
        moments = channel_moments_of_outputs(model, [(layer, channel_axis(layer)) for layer in replaced], data)
    return [
        (layer, moments[id(source)])
        for source in replaced
        if id(source) in moments
        for layer in cloner.replacements(source)
    ]


def _carry(plan: Plan, cloner: Cloner, changed: set[int], copies: bool):
    """Carries the state of all layers over; yields what did not come through."""
    graph_models = {id(graph.model): graph.functional for graph in plan.graphs}
    # Backwards, because a model is cloned after the layers inside it, and freezing it would freeze them all.
    for source, clone in reversed(cloner.clones.values()):
        decision = plan.decisions.get(id(source))
        if nested_model(source) is not None:
            clone.trainable = source.trainable
            graph_model = graph_models.get(id(source))
            if graph_model is not None and not carry_own_weights(source, clone, graph_model, copies):
                yield f"The weights that model '{source.name}' has outside its graph did not come through."
        elif decision is not None and decision.is_replaced:
            for layer in cloner.replacements(source):
                carried = carry_by_name(source, layer, copies)
                of_groups = isinstance(layer, BatchGroupNormalization) and "moving_mean" not in carried
                of_channels = isinstance(source, keras.layers.BatchNormalization)
                if copies and of_groups and of_channels and not carry_group_statistics(source, layer):
                    yield f"The moving statistics of '{source.name}' are those of channels. Those of parts start anew."
                if "moving_mean" in carried and decision.linear is not None and decision.linear.use_bias:
                    # Of the outputs without the bias.
                    layer.moving_mean.assign(layer.moving_mean - keras.ops.convert_to_tensor(decision.linear.bias))
        elif id(source) in changed:
            carry_by_name(source, clone, copies)
        elif isinstance(source, keras.layers.Layer) and id(source) not in plan.vanishing:
            carry_state(source, clone, copies)


def _shared_inside(plan: Plan):
    """Layers that are part of several others: `get_config` does not know that they are the same."""
    paths: dict[int, dict[int, str]] = collections.defaultdict(dict)
    for graph in plan.graphs:
        for operation in graph.operations.values():
            if isinstance(operation, keras.layers.Layer) and nested_model(operation) is None:
                for layer in operation._flatten_layers():
                    paths[id(layer)][id(operation)] = graph.path + operation.name
    for layers in paths.values():
        if len(layers) > 1:
            yield f"The layers {list(layers.values())} share weights. In the new model each has its own."


def _frozen_with(plan: Plan):
    names = [
        decision.linear.name
        for decision in plan.decisions.values()
        if decision.linear is not None and decision.linear.trainable and not decision.layer.trainable
    ]
    if names:
        yield (
            f"The layers {names} could be trained. They are now contained in the layers in the place of frozen "
            "normalizations, and are frozen with these."
        )


def _late_regularizers(cloner):
    names = [
        source.name
        for source, clone in cloner.clones.values()
        if isinstance(source, keras.layers.Layer) and not isinstance(source, keras.Model)
        if late_regularizers(source, clone)
    ]
    if names:
        yield (
            f"The regularizers of the layers {names} were set after these were built. In the old model they do nothing "
            "until it is saved and loaded; in the new one they take effect."
        )


def _hidden(plan: Plan):
    if plan.hidden:
        count, total = sum(plan.hidden.values()), sum(plan.hidden.values()) + len(plan.decisions)
        names = [repr(path) for path in plan.hidden]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more, see the report" if len(names) > 5 else "")
        yield (
            f"{count} of {total} normalizations were not reached and are as they were, because they are inside layers, "
            f"where the graph of the model does not lead: {listed}."
        )


def _nothing_replaced(model, layer_reports):
    found = "none in its graph"
    if layer_reports:
        kinds = ", ".join(sorted({layer.layer for layer in layer_reports}))
        found = f"{len(layer_reports)} ({kinds}), which were left alone; see the report and the argument `layers`"
    return f"No normalization layer of the model '{model.name}' was replaced. It has {found}."


def _layer_report(decision: Decision, cloner: Cloner, copies: bool, calibrated: set[int]):
    source = decision.layer
    report = LayerReport(
        path=decision.path,
        layer=type(source).__name__,
        action=decision.action,
        frozen=not source.trainable,
        reason=decision.reason,
    )
    if not decision.is_replaced:
        return report
    replacements = cloner.replacements(source)
    weights = {weight.name for layer in replacements for weight in layer.weights} if copies else ()
    return dataclasses.replace(
        report,
        names=tuple(layer.name for layer in replacements),
        activation=describe_activation(decision.activation),
        absorbed=tuple(operation.name for operation in decision.absorbed),
        channels=decision.channels,
        groups=getattr(replacements[0], "groups", None),
        linear=decision.linear and decision.linear.name,
        center=getattr(replacements[-1], "center", None),
        weights=tuple(weight.name for weight in source.weights if weight.name in weights),
        calibrated=id(replacements[0]) in calibrated,
    )
