"""Makes the layers that take the place of normalizations, and says how a model is rewritten with them."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_proxynorm.baselines import BatchGroupNormalization
from keras_proxynorm.graph.carrying import carry_by_name, copy_of, dtype_of
from keras_proxynorm.graph.layer_kinds import normalization_axis
from keras_proxynorm.graph.rewriting import Rewrite, clone_layer
from keras_proxynorm.surgery.planning import Decision
from keras_proxynorm.surgery.targets import Target, choose_groups

__all__ = ["Options", "make_layer", "rewrites"]


class Options(NamedTuple):
    """What a user asks of the new layers.

    Attributes:
        groups: The largest number of groups.
        min_channels_per_group: The smallest number of channels in a group.
        center: Whether layers without activation have a `beta`; None for the default.
        copies: Whether weights are copied.
    """

    groups: int
    min_channels_per_group: int
    center: bool | None
    copies: bool


_CARRIED_ARGUMENTS = [
    "epsilon",
    "momentum",
    "scale",
    *(f"{weight}_{kind}" for weight in ("beta", "gamma") for kind in ("initializer", "regularizer", "constraint")),
]


def make_layer(target: Target, options: Options, decision: Decision, with_activation: bool) -> keras.layers.Layer:
    """Makes the layer with the activation, or the one without, that takes the place of a normalization."""
    layer = decision.layer
    config = {**vars(layer), **layer.get_config()}
    center = options.center
    if center is None:
        center = layer.center and (options.copies or decision.activation_follows)
    own_groups = getattr(layer, "groups", None)
    arguments = {
        **{key: config[key] for key in _CARRIED_ARGUMENTS if key in config},
        "axis": normalization_axis(layer),
        "center": layer.center if with_activation else center,
        "channels": decision.channels,
        "groups": own_groups or choose_groups(decision.channels, options.groups, options.min_channels_per_group),
        "activation": decision.activation if with_activation else None,
        "name": decision.name if with_activation else layer.name,
        "dtype": dtype_of(decision.outermost if with_activation else layer),
    }
    if decision.linear is not None:
        # Its offset is the `beta` of the new layer.
        arguments["layer"] = clone_layer(decision.linear, use_bias=False)
    new = target.make(arguments)
    new.activity_regularizer = _activity_regularizer(decision, with_activation)
    return new


def _activity_regularizer(decision, with_activation):
    layers = decision.absorbed_operations if with_activation else [decision.layer]
    regularizers = [getattr(layer, "activity_regularizer", None) for layer in layers]
    return next((regularizer for regularizer in regularizers if regularizer is not None), None)


def rewrites(decisions: Iterable[Decision], copies: bool) -> Iterator[Rewrite]:
    """What becomes of the operations of a model by some decisions."""
    for decision in decisions:
        carry = functools.partial(_carry, decision, copies)
        for layer in decision.new_layers:
            absorbs = decision.absorbed if layer is decision.activated else ()
            yield Rewrite(decision.layer, functools.partial(_identity, layer), carry, absorbs, decision.linear)
        for activation in decision.renamed:
            dtype = dtype_of(decision.outermost)
            make = functools.partial(keras.layers.Identity, name=activation.name, dtype=dtype)
            yield Rewrite(activation, make, lambda *_: ())


def _identity(layer):
    return layer


def _carry(decision: Decision, copies: bool, source: Any, new: Any) -> list[str]:
    """Carries the weights of a normalization over to a new layer; returns what did not come through."""
    linear, notes = decision.linear, []
    carried = carry_by_name(source, new, copies)
    if linear is not None:
        carry_by_name(linear, new.layer, copies)
        if not source.trainable:
            new.layer.trainable = False
        if "moving_mean" in carried and linear.use_bias:
            # Of the outputs without the bias.
            new.moving_mean.assign(new.moving_mean - ops.convert_to_tensor(linear.bias))
    of_groups = isinstance(new, BatchGroupNormalization) and "moving_mean" not in carried
    of_channels = isinstance(source, keras.layers.BatchNormalization)
    if copies and of_groups and of_channels and not _carry_group_statistics(source, new):
        notes.append(f"The moving statistics of '{source.name}' are those of channels. Those of parts start anew.")
    return notes


def _carry_group_statistics(source, target) -> bool:
    """Sets moving statistics of groups of channels to what those of the channels say of the groups.

    Returns:
        Whether that was possible: groups of parts of channels have statistics that no channel tells.
    """
    mean, variance = copy_of(source.moving_mean), copy_of(source.moving_variance)
    groups = target.moving_mean.shape[0]
    if len(mean) % groups:
        return False
    mean, variance = mean.reshape(groups, -1), variance.reshape(groups, -1)
    target.moving_mean.assign(mean.mean(1))
    target.moving_variance.assign(variance.mean(1) + mean.var(1))
    return True
