"""Puts other normalizations into a model that exists: the one public function of the surgery."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Container, Iterable
from typing import Any, Literal, TypeAlias, overload

import keras

from keras_proxynorm.arguments import as_boolean, as_choice, as_positive_integer
from keras_proxynorm.graph.activation_nodes import describe_activation
from keras_proxynorm.graph.carrying import carry_compile_state, weights_by_name
from keras_proxynorm.graph.layer_kinds import NORMALIZATIONS, normalization_axis
from keras_proxynorm.graph.reading import as_path, check_readable, read_graphs
from keras_proxynorm.graph.rescaling import Followed
from keras_proxynorm.graph.rewriting import clone
from keras_proxynorm.observation.calls import check_batch
from keras_proxynorm.observation.layers import chooses
from keras_proxynorm.surgery.calibration import calibrate_layers, can_calibrate, channel_moments_of_outputs, set_affine
from keras_proxynorm.surgery.compensation import compensate_in, find_compensations, with_bias
from keras_proxynorm.surgery.new_layers import Options, make_layer, rewrites
from keras_proxynorm.surgery.notes import notes_about_plan
from keras_proxynorm.surgery.planning import Decision, hidden_normalizations, plan
from keras_proxynorm.surgery.report import LayerReport, ReplacementReport, Uncompensated
from keras_proxynorm.surgery.targets import Target

__all__ = ["LayerSelection", "replace_normalization"]

LayerChoice: TypeAlias = str | type | keras.layers.Layer
LayerSelection: TypeAlias = LayerChoice | Iterable[LayerChoice] | Callable[[keras.layers.Layer], bool] | None


@overload
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
    return_report: Literal[False] = False,
    **layer_kwargs: Any,
) -> keras.Model: ...


@overload
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
    return_report: Literal[True],
    **layer_kwargs: Any,
) -> tuple[keras.Model, ReplacementReport]: ...


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
    **layer_kwargs: Any,
) -> keras.Model | tuple[keras.Model, ReplacementReport]:
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
            ``"weight_normalization"``, which absorb the preceding dense or convolution layer. Or a function that makes
            a layer. It is called with those of these keyword arguments that it names: `activation`, `channels`,
            `groups`, `axis`, `epsilon`, `momentum`, `center`, `scale`, and `_initializer`, `_regularizer` and
            `_constraint` of `beta` and `gamma`; `layer`, the preceding linear layer, without bias; and with `name` and
            `dtype`, which it must pass on. If it does not name `activation`, activations stay where they are. If it
            names `layer`, normalizations of the output of one linear layer are replaced together with that layer, and
            the others left alone. A class of layers is such a function, and so is a `functools.partial` of either.
        groups: The largest number of groups. A layer gets the largest divisor of its number of channels that is not
            larger and leaves `min_channels_per_group` in each group; 1 if there is none. A `GroupNormalization` keeps
            its own.
        min_channels_per_group: The smallest number of channels in a group, unless it is all of them.
        weights: ``"copy"`` carries all weights over, of normalizations those that mean the same: `gamma` and `beta`,
            and moving statistics into layers that have them. ``"fresh"`` initializes all of them, except what
            preprocessing layers have adapted to.
        compensate: Proxy normalization adds a scale and an offset to what the next layers read. If True, the kernels
            and biases of these layers take that back, so that copied weights mean what they meant. That is exact, and
            done, for dense layers and for convolutions with 1x1 kernels or ``"valid"`` padding, also after pooling,
            cropping, flattening, dropout (at inference) and concatenation. Layers without bias get one. The report says
            where it was not possible; there, weights stay as they are. Regularizers and constraints of kernels see the
            new values.
        calibrate: A batch of inputs, as for a call of the model: some dozen samples of the data that the new model is
            for. On this batch the new model then does, channel by channel, what the old one does: gamma and beta are
            set so that the input of each activation has the mean and the standard deviation that it has in the old
            model, and proxies to those of the normalized input. Implies `compensate`, which then also takes back what
            it can only approximately: after zero padding, except at the border, and after gates, except for the
            offset. For group, layer and instance norm, with or without proxies.
        center: Whether layers without activation have a `beta`. By default they have one where weights are copied;
            with fresh weights they have one where an activation follows later, as after the sum in a ResNet, and none
            elsewhere, as in the paper. A `beta` that was not there is never added by default.
        layers: Which layers to replace: layers, names (alone or with the models they are nested in, such as
            ``"backbone/conv1_bn"``), classes, several of these, or a function of a layer. By default every
            `BatchNormalization`. A `LayerNormalization` or `GroupNormalization` that is asked for is replaced if it
            feeds one activation, or if the new layers have no activation. A `LayerNormalization` has statistics for
            each position; what replaces it has not.
        return_report: If True, return the report, too.
        **layer_kwargs: Further arguments of the new layers, such as `epsilon`, `scale` or `proxy_epsilon`. By default
            the `epsilon`, `momentum`, `scale`, initializers, regularizers and constraints of the old ones are kept.

    Returns:
        The new model, of the class of the old one if that is made of inputs and outputs. With ``return_report=True``
        also a `keras_proxynorm.surgery.ReplacementReport`, which can be printed.

        What is not understood is left alone, and the report and a warning give the reason: subclasses that override a
        method, calls with further tensors, groups that would have one value, and normalizations that standardize the
        features of the model's input.

        - Names of layers stay, except those of fused normalizations. So do names and structure of inputs and outputs.
        - Frozen layers stay frozen. The layer that replaces a frozen normalization is frozen as a whole, with its
          proxy, which is then N(0, 1), until `trainable` is set.
        - LoRA adapters, quantized weights and rematerialization of the layers that are cloned come through.
        - If the model was compiled, so is the new one, with a fresh optimizer.
        - A dtype policy stays with its layer; a fused layer has that of the activation.
        - Random seeds of dropout and the like start anew.

    Raises:
        ValueError: For bad arguments; for a model that is not built, or is neither functional nor sequential; and for
            a layer that cannot be cloned, which the message names.

    Warns:
        UserWarning: If nothing was replaced; about what was left alone; about normalizations that follow their
            activation, so that there is none to fuse with; and about all that did not come through: batch
            normalizations inside other layers, custom classes of models, regularizers that were set after `build`,
            custom losses.

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
    options = Options(
        as_positive_integer("groups", groups),
        as_positive_integer("min_channels_per_group", min_channels_per_group),
        as_choice("center", center, (None, True, False)),
        as_choice("weights", weights, ("copy", "fresh")) == "copy",
    )
    target = Target(to, layer_kwargs)
    graphs = read_graphs(model)
    decisions = plan(graphs, _selector(layers, graphs), target, functools.partial(make_layer, target, options))
    _check_compensate(compensate, options, target, decisions)
    _check_calibrate(calibrate is not None, options, target, decisions)
    moments = {} if calibrate is None else _moments_of_old_layers(model, decisions, calibrate)
    followed = Followed([], [], [])
    if compensate or (calibrate is not None and target.fuses):
        followed = find_compensations(graphs, decisions, approximate=calibrate is not None)

    cloned = clone(graphs, [*rewrites(decisions, options.copies), *with_bias(followed.absorptions)], options.copies)
    calibrated = {layer: moments[x.layer] for x in decisions if x.layer in moments for layer in x.new_layers}
    for layer, of_old_layer in calibrated.items():
        set_affine(layer, *of_old_layer)
    for absorption in followed.absorptions:
        compensate_in(cloned.counterpart(absorption.layer), absorption)
    if calibrated:
        calibrate_layers(cloned.model, calibrated, calibrate)

    notes = [
        *cloned.notes,
        *notes_about_plan(model, graphs, decisions, target),
        *carry_compile_state(model, cloned.model),
    ]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    report = ReplacementReport(
        model=model.name,
        to=target.name,
        layers=tuple(_layer_report(target, options.copies, calibrated, decision) for decision in decisions),
        hidden=hidden_normalizations(graphs),
        parameters_before=model.count_params(),
        parameters_after=cloned.model.count_params(),
        compensated={absorption.path: absorption.rescaling.sources for absorption in followed.absorptions},
        uncompensated=tuple(Uncompensated(*obstacle) for obstacle in followed.obstacles),
        warnings=tuple(notes),
    )
    return (cloned.model, report) if return_report else cloned.model


def _selector(layers, graphs):
    candidates = [
        (as_path(graph, operation), operation)
        for graph in graphs
        for operation in graph.operations
        if isinstance(operation, NORMALIZATIONS)
    ]
    layers = keras.layers.BatchNormalization if layers is None else layers
    return chooses(layers, candidates, "normalization", NORMALIZATIONS)


def _check_compensate(compensate, options, target, decisions):
    if not as_boolean("compensate", compensate):
        return
    if not options.copies:
        raise ValueError(
            "Argument `compensate` keeps the meaning of copied weights, so it needs weights='copy'. "
            "Received: compensate=True, weights='fresh'"
        )
    activated = [x.activated for x in decisions if x.activated is not None]
    if not target.fuses or not all(hasattr(layer, "activation_moments") for layer in activated):
        raise ValueError(
            "Argument `compensate` undoes proxy normalization, so it needs layers that have it, with the method "
            f"`activation_moments`. Received: compensate=True, to={target.name!r}"
        )


def _check_calibrate(calibrate, options, target, decisions):
    if not calibrate:
        return
    if not options.copies:
        raise ValueError(
            "Argument `calibrate` makes the new model do what the old one does, so it needs weights='copy'. "
            "Received: weights='fresh'"
        )
    if target.contains_linear or not all(can_calibrate(layer) for x in decisions for layer in x.new_layers):
        raise ValueError(
            "Argument `calibrate` is for group, layer and instance norm, with or without proxy normalization. "
            f"Received: to={target.name!r}"
        )


def _moments_of_old_layers(model, decisions, batch):
    """The channel moments of the outputs of the layers that are replaced, on a batch."""
    check_batch("calibrate", model, batch)
    replaced = [(x.layer, normalization_axis(x.layer)) for x in decisions if x.is_replaced]
    return channel_moments_of_outputs(model, replaced, batch)


def _layer_report(target: Target, copies: bool, calibrated: Container[Any], decision: Decision) -> LayerReport:
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
    if decision.activated is not None and target.has_own_nonlinearity:
        name = describe_activation(decision.activation)
        report = dataclasses.replace(report, reason=f"a nonlinearity of its own takes the place of {name}")
    pairs = [pair for layer in decision.new_layers for pair in weights_by_name(source, layer)]
    weights = {old.name for old, _ in pairs} if copies else ()
    return dataclasses.replace(
        report,
        names=tuple(layer.name for layer in decision.new_layers),
        activation=None if target.has_own_nonlinearity else describe_activation(decision.activation),
        absorbed=tuple(operation.name for operation in decision.absorbed_operations),
        channels=decision.channels,
        groups=getattr(decision.new_layers[0], "groups", None),
        linear=decision.linear and decision.linear.name,
        center=getattr(decision.new_layers[-1], "center", None),
        weights=tuple(weight.name for weight in source.weights if weight.name in weights),
        calibrated=decision.new_layers[0] in calibrated,
    )
