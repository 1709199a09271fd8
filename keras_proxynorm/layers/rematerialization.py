"""Layers that compute their outputs anew for the gradient, where a `keras.RematScope` asks for it."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_proxynorm.compat import rematerialization_mode
from keras_proxynorm.moments import Tensor

__all__ = ["WithRematerialization"]


class WithRematerialization(keras.layers.Layer):
    """A layer of one input that trains within a `keras.RematScope` as it does without, on every backend.

    Keras's own layers do not if they have a mask or update weights in training. The mode ``"activations"``
    rematerializes all of a layer that has an activation, because that is one step with its normalization.
    """

    def rematerialized_call(self, layer_call: Callable, inputs: Tensor, *args: Any, **kwargs: Any) -> Callable:
        """What Keras calls in place of `call`, for a layer made within a `keras.RematScope`."""
        if rematerialization_mode(self) == "activations":
            applies = getattr(self, "activation", None) not in (None, keras.activations.linear)
        else:
            applies = super().rematerialized_call(layer_call, inputs) is not layer_call
        return self._rematerialized(layer_call) if applies else layer_call

    def _rematerialized(self, layer_call):
        def call(inputs, *args, **kwargs):
            # Bound, because TensorFlow rematerializes functions of float tensors only, without keywords.
            def bound(inputs):
                return layer_call(inputs, *args, **kwargs)

            updates_weights = kwargs.get("training") and self.trainable and self.non_trainable_variables
            return self._rematerialize_update(bound, inputs) if updates_weights else keras.remat(bound)(inputs)

        return call

    def _rematerialize_update(self, layer_call, inputs):
        """A call that updates weights, as a function without side effects, since it is computed twice."""
        weights, state = self.trainable_variables, self.non_trainable_variables
        # Copied, or the second computation would see what is assigned below.
        before = [(variable, ops.copy(variable)) for variable in state]

        def function(inputs, *values):
            with keras.StatelessScope([*zip(weights, values, strict=True), *before]) as scope:
                outputs = layer_call(inputs)
                return outputs, [ops.stop_gradient(scope.get_current_value(variable)) for variable in state]

        # Weights are arguments, because TensorFlow finds no gradients of tensors that a function captures.
        outputs, after = keras.remat(function)(inputs, *map(ops.convert_to_tensor, weights))
        for variable, value in zip(state, after, strict=True):
            variable.assign(value)
        return outputs
