"""Observes calls of layers while a model runs as it is, without a change to the model."""

import contextlib
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import keras
from keras import ops

from keras_proxynorm.layers.proxy_normalization import ProxyNormalizationLayer
from keras_proxynorm.observation.channels import channel_axis, channel_moments

__all__ = [
    "check_all_seen",
    "check_batch",
    "is_visible",
    "left_unchanged",
    "normalized_input",
    "observed",
    "visit_normalized_inputs",
]


# Pairs of names by layer's id and a function. Each thread has its own, so that it observes only what it runs itself.
_observers: ContextVar[tuple[tuple[dict[int, str], Callable], ...]] = ContextVar("observers", default=())
_hooks_lock = threading.Lock()


class _Hook:
    """Replaces `layer.call` while any thread observes the layer, and asks the observers of the thread that calls."""

    def __init__(self, layer):
        self.layer, self.call, self.is_own = layer, layer.call, "call" in vars(layer)
        self.users: set[object] = set()

    def __call__(self, *args, **kwargs):
        call = self.call
        for names, observe in _observers.get():
            if id(self.layer) in names:
                call = _observed_call(names[id(self.layer)], self.layer, call, observe)
        return call(*args, **kwargs)


def _observed_call(name, layer, call, observe):
    return lambda *args, **kwargs: observe(name, layer, call, args, kwargs)


def _install(layer, user):
    with _hooks_lock:
        hook = vars(layer).get("call")
        if not isinstance(hook, _Hook):
            hook = _Hook(layer)
            # Past Keras and PyTorch, which track attributes.
            object.__setattr__(layer, "call", hook)
        hook.users.add(user)


def _remove(layer, user):
    """Undoes `_install`, even one that was interrupted or did not begin."""
    with _hooks_lock:
        hook = vars(layer).get("call")
        if not isinstance(hook, _Hook):
            return
        hook.users.discard(user)
        if not hook.users and hook.is_own:
            object.__setattr__(layer, "call", hook.call)
        elif not hook.users:
            object.__delattr__(layer, "call")


@contextlib.contextmanager
def observed(layers: Mapping[str, keras.layers.Layer], observe: Callable) -> Iterator[None]:
    """Calls a function in place of `layer.call` while the context is active, in this thread only.

    Any number of threads may observe and run a model at once.

    Args:
        layers: Layers by name.
        observe: Function of the name, the layer, its own `call`, and the positional and keyword arguments of the call;
            returns what the call returns.
    """
    observer = {id(layer): name for name, layer in layers.items()}, observe
    user = object()
    with contextlib.ExitStack() as stack:
        # An interrupt can come between any two lines: what undoes a change is registered before it.
        for layer in layers.values():
            stack.callback(_remove, layer, user)
            _install(layer, user)
        before = _observers.get()
        stack.callback(_observers.set, before)
        _observers.set((*before, observer))
        yield


@contextlib.contextmanager
def left_unchanged(variables: Iterable, values: Iterable | None = None) -> Iterator[None]:
    """Undoes all assignments to variables and random states in the block.

    Args:
        variables: Variables that have other values in the block, or whose regularization is computed there.
        values: Their values in the block. Defaults to those that they have.
    """
    values = [variable.value for variable in variables] if values is None else values
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "torch":
            import torch

            # For dropout without a seed. The same for all blocks, as for layers with a seed.
            stack.enter_context(torch.random.fork_rng())
        # Without a value here, Keras finds none for the regularization of a variable.
        stack.enter_context(keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))))
        yield


def normalized_input(layer: keras.layers.Layer, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The normalized input of a normalization layer in one call, before gamma and beta and all that follows them."""
    if isinstance(layer, ProxyNormalizationLayer):
        return layer.normalize_inputs(*args, **{key: kwargs[key] for key in ("inputs", "mask") if key in kwargs})
    neutral = {"gamma": ops.ones, "scale": ops.ones, "beta": ops.zeros}
    weights = [(getattr(layer, name, None), make) for name, make in neutral.items()]
    mapping = [(x, make(x.shape, x.dtype)) for x, make in weights if isinstance(x, keras.Variable)]
    # The layer's own call computes it, with a neutral gamma and beta that are gone afterwards.
    with keras.StatelessScope(state_mapping=mapping):
        return call(*args, **kwargs)


def visit_normalized_inputs(
    model: keras.Model, layers: Iterable[keras.layers.Layer], data: Any, visit: Callable
) -> None:
    """Runs a model and visits normalization layers in the order of their first calls, each before it computes.

    Args:
        model: A model.
        layers: Normalization layers in it.
        data: A batch of inputs, as for a call of the model.
        visit: Function of a layer and of mean and standard deviation of each channel of its normalized input. If it
            changes the layer, the layers that follow are visited with the inputs that result.
    """
    layers = {str(id(layer)): layer for layer in layers}
    waiting = set(layers)

    def observe(name, layer, call, args, kwargs):
        if name in waiting:
            waiting.remove(name)
            value = normalized_input(layer, call, args, kwargs)
            visit(layer, *channel_moments(value, channel_axis(layer, len(value.shape))))
        return call(*args, **kwargs)

    with observed(layers, observe):
        model(data, training=False)


def check_batch(name: str, model: keras.Model, data: Any) -> None:
    """Runs a model on the value of an argument, which must be a batch of inputs.

    Args:
        name: Name of the argument.
        model: The model.
        data: The value of the argument.

    Raises:
        ValueError: If there are no samples, or if the model does not run. A fault of this package is raised as it is.
    """
    try:
        shapes = [tuple(getattr(x, "shape", ())) for x in keras.tree.flatten(data) if x is not None]
        if {shape[:1] for shape in shapes} <= {(0,)}:
            raise ValueError("there are no samples in it")
        model(data, training=False)
    except Exception as error:  # whatever the layers of the user raise
        if _is_fault_of_package(error):
            raise
        received = keras.tree.map_structure(lambda x: f"shape {tuple(x.shape)}" if hasattr(x, "shape") else x, data)
        raise ValueError(
            f"Argument `{name}` must be a batch of inputs of the model, as for a call of it. Received: {received}, "
            f"with which the model '{model.name}' does not run: {error}"
        ) from error


def _is_fault_of_package(error):
    """Whether code of this package raised it, and not to name an argument that is wrong."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package == __name__.partition(".")[0] and not isinstance(error, ValueError)


def is_visible(x: Any) -> bool:
    """Whether a value is one tensor of rank 2 or more that holds numbers, and is not being traced."""
    if not keras.ops.is_tensor(x) or len(x.shape) < 2:
        return False
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return isinstance(x, tf.Tensor) and hasattr(x, "numpy")
    if backend == "jax":
        import jax

        return not isinstance(x, jax.core.Tracer)
    return not isinstance(x, keras.KerasTensor)


def check_all_seen(chosen: Iterable[str], seen: Iterable[str]) -> None:
    """Warns about layers without a value that could be observed.

    Args:
        chosen: The names of the layers that were to be observed.
        seen: The names of those that were.

    Raises:
        ValueError: If no layer was observed.
    """
    hidden = [name for name in chosen if name not in seen]
    if len(hidden) == len([*chosen]):
        raise ValueError(
            "Argument `layers` must have layers with one output each, that are called, and not in a loop or a compiled "
            f"function. Received: {', '.join(hidden)}"
        )
    if hidden:
        warnings.warn(
            "Left out, because they were not called, have several outputs, or run in a loop or a compiled function: "
            f"{', '.join(hidden)}",
            stacklevel=4,
        )
