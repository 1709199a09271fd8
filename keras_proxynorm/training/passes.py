"""One step of sharpness-aware minimization: two passes over a batch, on each backend of Keras."""

import contextlib
from typing import Any

import keras
from keras import ops

from keras_proxynorm.compat import track_loss, update_metrics

__all__ = ["train_step"]


def train_step(sam: Any, *arguments: Any) -> Any:
    """Does one step; takes and returns what `keras.Model.train_step` does on the backend in use.

    Args:
        sam: A `SharpnessAwareMinimization`.
        *arguments: The arguments of `keras.Model.train_step`.
    """
    return (_jax_step if keras.backend.backend() == "jax" else _stateful_step)(sam, *arguments)


def _stateful_step(sam, data):
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    weights, state, carried = sam.trainable_variables, sam.non_trainable_variables, _carried(sam)
    # Copies, because PyTorch updates variables in place.
    start = [(variable, ops.copy(variable)) for variable, carry in zip(state, carried, strict=True) if not carry]

    def forward():
        y_pred = sam(x, training=True)
        loss = sam.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
        return sam.optimizer.scale_loss(loss), (loss, y_pred)

    gradients, (loss, y_pred) = _gradients(forward, [weight.value for weight in weights])
    batch_size = ops.shape(next(tensor for tensor in keras.tree.flatten(x) if tensor is not None))[0]
    track_loss(sam, loss * _replicas(), batch_size)
    with _no_gradients():
        values = [ops.copy(weight) for weight in weights]  # of variables of TensorFlow, tensors
        rho = ops.convert_to_tensor(sam.rho_variable)
        moved = sam.perturb(values, gradients, sam.optimizer.scale_loss(1.0), rho)

    # No variable changes: reading and assigning variables acts on the values of the scope.
    with _SecondPass([*start, *zip(weights, moved, strict=True)], collect_losses=True) as scope:
        gradients, _ = _gradients(forward, moved)
    with _no_gradients():
        for variable, carry in zip(state, carried, strict=True):
            value = scope.get_current_value(variable)
            if carry and value is not None:
                # Without a perturbation there is only one pass.
                variable.assign(ops.where(rho > 0, value, variable))
        sam.optimizer.apply(gradients, weights)
    return sam.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def _jax_step(sam, state, data):
    weights, others, optimizer_state, metrics_state = state
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    carried = _carried(sam)

    import jax

    gradients_and_outputs = jax.grad(sam.compute_loss_and_updates, has_aux=True)

    def gradients_at(weights, others):
        return gradients_and_outputs(
            weights, others, metrics_state, x, y, sample_weight, training=True, optimizer_variables=optimizer_state
        )

    gradients, (loss, y_pred, after_first, new_metrics_state) = gradients_at(weights, others)
    with keras.StatelessScope(list(zip(sam.optimizer.variables, optimizer_state, strict=True))):
        loss_scale = sam.optimizer.scale_loss(1.0)
    (rho,) = (value for v, value in zip(sam.non_trainable_variables, others, strict=True) if v is sam.rho_variable)
    moved = sam.perturb(weights, gradients, loss_scale, rho)
    gradients, (_, _, after_second, _) = gradients_at(moved, _choose(carried, after_first, others))
    weights, optimizer_state = sam.optimizer.stateless_apply(optimizer_state, gradients, weights)
    logs, metrics_state = update_metrics(sam, new_metrics_state, loss, x, y, y_pred, sample_weight)
    # Without a perturbation there is only one pass.
    after_second = [ops.where(rho > 0, second, first) for first, second in zip(after_first, after_second, strict=True)]
    return logs, (weights, _choose(carried, after_second, after_first), optimizer_state, metrics_state)


class _SecondPass(keras.StatelessScope):
    """A scope in which trainable variables stay as they are.

    The first pass has assigned what its layers assign to them. Once more would be another function of the weights.
    """

    def add_update(self, update):
        if not update[0].trainable:
            super().add_update(update)


def _carried(sam):
    """For each non-trainable variable, whether the second pass continues from the first and keeps its value."""
    # Only `variables`, not `weights`, contain the states of random generators: both passes draw the same.
    weights = {id(variable) for variable in sam.weights}
    twice = sam.update_moving_statistics == "twice"
    return [twice and id(variable) in weights for variable in sam.non_trainable_variables]


def _choose(conditions, values, others):
    return [v if c else o for c, v, o in zip(conditions, values, others, strict=True)]


def _gradients(forward, values):
    """The gradients of a loss by variables of the backend or tensors, and what `forward` returns with the loss."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(values)
            loss, outputs = forward()
        return tape.gradient(loss, values), outputs

    import torch

    for value in values:
        value.requires_grad_()
    loss, outputs = forward()
    return torch.autograd.grad(loss, values, allow_unused=True), outputs


def _no_gradients():
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()

    import torch

    return torch.no_grad()


def _replicas():
    """The number of replicas, by which Keras divides the loss in each replica."""
    if keras.backend.backend() != "tensorflow":
        return 1

    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync
