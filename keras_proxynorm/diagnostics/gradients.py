"""The loss of a model as a function, and its gradients, on each backend of Keras."""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
from keras import ops

__all__ = ["LossLike", "batch_loss", "compiled_value_and_gradients", "norm", "value_and_gradients"]

LossLike: TypeAlias = str | Callable | keras.losses.Loss | None


def batch_loss(model: keras.Model, loss: LossLike, training: bool) -> Callable:
    """The loss of a batch as a function that runs the model.

    Args:
        model: A built model.
        loss: A name, a function or an instance of a loss of Keras; None for the loss that the model is compiled with,
            regularization included.
        training: How the model is called.

    Returns:
        A function of inputs, targets and sample weights that returns a scalar tensor.

    Raises:
        ValueError: If `loss` is None and the model is not compiled with a loss, or if Keras does not know the name.
    """
    if loss is None:
        if not getattr(model, "compiled", False) or getattr(model, "loss", None) is None:
            raise ValueError(
                "Argument `loss` must be given, such as loss='sparse_categorical_crossentropy', because the model is "
                f"not compiled with one. Received: loss=None and the model '{model.name}'"
            )

        def compiled(inputs, targets, weights):
            outputs = model(inputs, training=training)
            return model.compute_loss(x=inputs, y=targets, y_pred=outputs, sample_weight=weights, training=training)

        return compiled
    function = keras.losses.get(loss)
    if not isinstance(function, keras.losses.Loss):
        function = _LossOfFunction(function)

    def given(inputs, targets, weights):
        return function(targets, model(inputs, training=training), sample_weight=weights)

    return given


class _LossOfFunction(keras.losses.Loss):
    """The loss that `compile` makes of a function of targets and outputs: its mean over the batch."""

    def __init__(self, function):
        super().__init__(name=getattr(function, "__name__", "loss").strip("<>_"))
        self.function = function

    def call(self, y_true, y_pred):
        return self.function(y_true, y_pred)


def value_and_gradients(function: Callable, values: list) -> tuple:
    """The value of a scalar function of a list of tensors, and its gradients, of which None means zero."""
    if not values:
        return function([]), []
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        values = [tf.convert_to_tensor(value) for value in values]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            result = function(values)
        gradients = tape.gradient(result, values)
        # Gradients of embeddings are sparse.
        return result, [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]
    if backend == "jax":
        import jax

        return jax.value_and_grad(function)(values)
    if backend == "torch":
        import torch

        values = [value.detach().requires_grad_() for value in map(ops.convert_to_tensor, values)]
        result = function(values)
        gradients = torch.autograd.grad(result, values, allow_unused=True)
        return result.detach(), list(gradients)
    raise RuntimeError(f"Gradients need the TensorFlow, JAX or PyTorch backend of Keras. Received: {backend!r}")


def compiled_value_and_gradients(function: Callable) -> Callable[[list, Any], tuple]:
    """`value_and_gradients` as a compiled function of the list of tensors and a batch.

    Args:
        function: Scalar function of a list of tensors and a batch.
    """

    def both(values, batch):
        return value_and_gradients(lambda values: function(values, batch), values)

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(both, autograph=False)
    if backend == "jax":
        import jax

        return jax.jit(both)
    return both


def norm(tensors: list) -> float:
    """The Euclidean norm of all elements of a list of tensors, in which None counts as zero."""
    squares = (float(ops.sum(ops.square(ops.cast(x, "float32")))) for x in tensors if x is not None)
    return sum(squares) ** 0.5
