"""The loss along the gradient: the largest stable step, and how much the gradient changes along it."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import keras
import numpy as np

from keras_proxynorm.arguments import argument_error, check_built_model
from keras_proxynorm.compat import layers_inside
from keras_proxynorm.diagnostics.batches import Batch, batches
from keras_proxynorm.diagnostics.gradients import LossLike, batch_loss, compiled_value_and_gradients, norm
from keras_proxynorm.diagnostics.plots import plot_landscape
from keras_proxynorm.observation.calls import left_unchanged

__all__ = ["LossLandscape", "loss_landscape"]

# The number of times that the interval in which the loss begins to diverge is halved.
_BISECTIONS = 6


@dataclass(frozen=True, eq=False)
class LossLandscape:
    """The result of `loss_landscape`; as a string, a summary.

    Attributes:
        loss: Float, the loss before the step.
        gradient_norm: Float, the Euclidean norm of the gradient before the step.
        step_sizes: Array, the step sizes.
        losses: Array, the loss after a step of each size.
        gradient_changes: Array, the Euclidean distance between the gradients after and before the step.
        largest_stable_step: Float, the largest step size up to which the loss does not diverge; 0 if it diverges at the
            smallest of `step_sizes`.

    Example:

    >>> import keras, numpy as np
    >>> from keras_proxynorm.diagnostics import loss_landscape
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones", use_bias=False)])
    >>> batch = np.ones((1, 1)), np.zeros((1, 1))
    >>> landscape = loss_landscape(model, batch, loss="mse", step_sizes=[0.25, 0.5, 2.0])  # of the loss w ** 2
    >>> landscape.losses.tolist(), landscape.smoothness.tolist(), round(landscape.largest_stable_step, 1)
    ([0.25, 0.0, 9.0], [2.0, 2.0, 2.0], 1.0)
    """

    loss: float
    gradient_norm: float
    step_sizes: np.ndarray
    losses: np.ndarray
    gradient_changes: np.ndarray
    largest_stable_step: float

    @property
    def relative_losses(self) -> np.ndarray:
        """`losses`, divided by `loss` (Bjorck et al.); NaN for a loss of 0."""
        return self.losses / self.loss if self.loss else np.full_like(self.losses, np.nan)

    @property
    def smoothness(self) -> np.ndarray:
        """The change of the gradient, divided by the length of the step, for each step size; NaN without a gradient."""
        lengths = self.step_sizes * self.gradient_norm
        return np.divide(self.gradient_changes, lengths, out=np.full_like(lengths, np.nan), where=lengths > 0)

    @property
    def loss_range(self) -> tuple[float, float]:
        """The smallest and the largest of `losses`: the variation of the loss (Santurkar et al.)."""
        return _range(self.losses)

    @property
    def gradient_predictiveness(self) -> tuple[float, float]:
        """The smallest and the largest of `gradient_changes` (Santurkar et al.); small is good."""
        return _range(self.gradient_changes)

    @property
    def effective_smoothness(self) -> float:
        """The largest of `smoothness`: the effective beta-smoothness (Santurkar et al.); small is good.

        Compare networks with the same step sizes: across the kinks of relu, it grows as the steps become smaller.
        """
        return _range(self.smoothness)[1]

    def to_dict(self) -> dict[str, float]:
        """The summary as numbers by name."""
        low, high = self.loss_range
        least, most = self.gradient_predictiveness
        return {
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "loss_min": low,
            "loss_max": high,
            "gradient_change_min": least,
            "gradient_change_max": most,
            "effective_smoothness": self.effective_smoothness,
            "largest_stable_step": self.largest_stable_step,
        }

    def __str__(self):
        return "\n".join(f"{name.replace('_', ' '):<22}{value:>12.4g}" for name, value in self.to_dict().items())

    def plot(self, axes: Any = None) -> np.ndarray:
        """The relative loss and the change of the gradient against the step size.

        Args:
            axes: Two `matplotlib.axes.Axes`. Defaults to those of a new figure.

        Returns:
            An array of `matplotlib.axes.Axes`.

        Raises:
            ImportError: If matplotlib is not installed: ``pip install "keras_proxynorm[plots]"``.
        """
        return plot_landscape(self, axes)


def loss_landscape(
    model: keras.Model,
    batch: Batch,
    *,
    loss: LossLike = None,
    step_sizes: Sequence[float] | None = None,
    divergence: float = 1.0,
    training: bool = True,
) -> LossLandscape:
    """Measures the loss of a batch, and its gradient, along the gradient.

    From the weights ``w`` with the gradient ``g``, it evaluates ``w - s g`` for each step size ``s``, all on the same
    batch. Only trainable weights move, and the model itself is not changed.

    Args:
        model: A built Keras model of any kind.
        batch: A tuple ``(inputs, targets)`` or ``(inputs, targets, sample_weights)`` of arrays or tensors.
        loss: A name, a function or an instance of a loss. Defaults to the one that the model is compiled with,
            regularization included.
        step_sizes: Positive numbers in increasing order. Defaults to 16 numbers from 1e-4 to 10, evenly spaced on a
            logarithmic scale: a choice of this package, as the papers use others for other networks. Santurkar et al.
            use 1/2 to 4 times the learning rate.
        divergence: Number from 1 on: the loss diverges where it is not finite, or larger than `divergence` times the
            loss before the step (for a negative loss: larger by ``divergence - 1`` times its absolute value). Defaults
            to 1.
        training: Whether the model is called as in training. Defaults to True, as in the papers.

    Returns:
        A `LossLandscape`. It costs a compilation and ``len(step_sizes) + 1`` forward and backward passes, and up to 6
        more to locate where the loss begins to diverge.

    Raises:
        ValueError: If the model is not built, has no trainable weights or no loss, or if an argument is not as
            described above. A loss that is not finite is no error and gives NaN.

    Example:

    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.diagnostics import loss_landscape
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras_proxynorm.LayerNormProxy()])
    >>> images = np.random.normal(size=(64, 8, 8, 3))
    >>> landscape = loss_landscape(model, (images, images), loss="mse")
    >>> bool(landscape.relative_losses[0] < 1)
    True

    References:

    - [Santurkar et al., 2018](https://arxiv.org/abs/1805.11604), "How Does Batch Normalization Help Optimization?"
    - [Bjorck et al., 2018](https://arxiv.org/abs/1806.02375), "Understanding Batch Normalization"
    """
    check_built_model(model)
    variables = model.trainable_variables
    if not variables:
        raise argument_error("model", model, "a model that has trainable weights")
    sizes = np.geomspace(1e-4, 10, 16) if step_sizes is None else _as_step_sizes(step_sizes)
    if isinstance(divergence, bool) or not isinstance(divergence, Real) or not float(divergence) >= 1:
        raise argument_error("divergence", divergence, "a number from 1 on")
    evaluate = _loss_and_gradient(model, batch_loss(model, loss, training), _whole(batch))
    start = [keras.ops.convert_to_tensor(variable) for variable in variables]
    before, gradient = evaluate(start)

    def evaluate_after(size):
        steps = zip(start, gradient, strict=True)
        return evaluate([w if g is None else w - keras.ops.cast(size, w.dtype) * g for w, g in steps])

    # The smallest steps may change the loss by less than its rounding.
    limit = before + (divergence - 1 + 4 * _rounding(model)) * abs(before)

    def is_stable(loss):
        return bool(np.isfinite(loss) and loss <= limit)

    losses, changes = [], []
    for size in sizes:
        after, changed = evaluate_after(size)
        losses.append(after)
        changes.append(norm([_difference(a, b) for a, b in zip(changed, gradient, strict=True)]))
    stable = [is_stable(after) for after in losses]
    largest = _last_stable(sizes, stable, lambda size: is_stable(evaluate_after(size)[0]))
    return LossLandscape(before, norm(gradient), sizes, np.array(losses), np.array(changes), largest)


def _whole(batch):
    """A batch that the user gave, as one batch whatever its size."""
    if not isinstance(batch, tuple) or len(batch) not in (2, 3):
        raise ValueError(
            "Argument `batch` must be a tuple (inputs, targets) or (inputs, targets, sample_weights). "
            f"Received: batch of the type {type(batch).__name__}"
        )
    (whole,) = batches(iter([batch]))
    return keras.tree.map_structure(lambda x: None if x is None else keras.ops.convert_to_tensor(x), whole)


def _loss_and_gradient(model, compute_loss, batch):
    """The loss of a batch and its gradient, as a compiled function of the values of the trainable weights."""

    def loss_at(values, batch):
        with left_unchanged(model.trainable_variables, values):
            return compute_loss(*batch)

    compiled = compiled_value_and_gradients(loss_at)

    def evaluate(values):
        loss, gradient = compiled(values, batch)
        return float(keras.ops.convert_to_numpy(loss)), gradient

    return evaluate


def _as_step_sizes(step_sizes):
    try:
        sizes = np.array(step_sizes, "float64")
    except (TypeError, ValueError):
        sizes = np.array([])
    if sizes.ndim != 1 or not sizes.size or not np.isfinite(sizes).all() or not (np.diff(sizes, prepend=0) > 0).all():
        raise argument_error("step_sizes", step_sizes, "positive numbers in increasing order")
    return sizes


def _rounding(model):
    """The unit of rounding of the least precise layer."""
    units = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}
    return max(units.get(layer.compute_dtype, 2.0**-23) for layer in layers_inside(model))


def _difference(a, b):
    if a is None or b is None:
        return b if a is None else a
    return a - b


def _last_stable(sizes, stable, is_stable):
    """The size up to which all are stable, by bisection between the last stable and the first unstable size."""
    if all(stable):
        return float(sizes[-1])
    first = stable.index(False)
    if first == 0:
        return 0.0
    low, high = sizes[first - 1], sizes[first]
    for _ in range(_BISECTIONS):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if is_stable(middle) else (low, middle)
    return float(low)


def _range(values):
    """The smallest and the largest value, where NaN counts as infinite; NaN if all are."""
    if np.isnan(values).all():
        return np.nan, np.nan
    values = np.where(np.isnan(values), np.inf, values)
    return float(values.min()), float(values.max())
