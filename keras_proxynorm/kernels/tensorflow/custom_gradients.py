"""Functions whose gradient is written by hand, on TensorFlow, and can be differentiated again."""

from collections.abc import Callable

__all__ = ["with_gradient"]


def with_gradient(formula: Callable, forward: Callable) -> Callable:
    """A function of tensors with a gradient by hand, for TensorFlow.

    The gradient of the gradient goes by automatic differentiation of `formula`, so that `forward` may keep any value
    for its gradient. On PyTorch such values would be constants for a second derivative, and on JAX a gradient by hand
    rules out forward mode; both do well without.

    Args:
        formula: The function, in operations that TensorFlow can differentiate.
        forward: The same function faster: from the inputs to ``(outputs, backward)``, where ``backward`` maps the
            gradients of the outputs to a list of those of the inputs.

    Returns:
        A function of tensors.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def function(*inputs):
        outputs, backward = forward(*inputs)

        def gradient(*upstreams):
            count = len(upstreams)

            @tf.custom_gradient
            def differentiable_gradient(*upstreams_and_inputs):
                def second(*seconds):
                    upstreams, inputs = upstreams_and_inputs[:count], upstreams_and_inputs[count:]
                    with tf.GradientTape() as outer:
                        outer.watch(upstreams_and_inputs)
                        with tf.GradientTape() as inner:
                            inner.watch(inputs)
                            outputs = formula(*inputs)
                        upstream = upstreams if isinstance(outputs, (tuple, list)) else upstreams[0]
                        first = inner.gradient(outputs, inputs, upstream, tf.UnconnectedGradients.ZERO)
                    return outer.gradient(first, upstreams_and_inputs, seconds, tf.UnconnectedGradients.ZERO)

                return backward(*upstreams), second

            return differentiable_gradient(*upstreams, *inputs)

        return outputs, gradient

    return function
