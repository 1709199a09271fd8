"""How activations and gradients propagate through a network: moments, similarity of samples, rank, gradient norms."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm.arguments import check_built_model
from keras_proxynorm.diagnostics.batches import batches
from keras_proxynorm.diagnostics.gradients import LossLike, batch_loss, norm, value_and_gradients
from keras_proxynorm.diagnostics.plots import plot_signal
from keras_proxynorm.diagnostics.streaming import ChannelPowers, StreamingMoments
from keras_proxynorm.diagnostics.tables import LayerTable
from keras_proxynorm.observation.calls import check_all_seen, is_visible, left_unchanged, observed
from keras_proxynorm.observation.channels import channel_axis, channel_moments
from keras_proxynorm.observation.layers import LayerChoice, choose, distinct, has_activation

__all__ = ["SignalPropagation", "signal_propagation"]


@dataclass(frozen=True, eq=False)
class SignalPropagation(LayerTable):
    """The result of `signal_propagation`; as a string, a table.

    Attributes:
        names: Tuple of the names of the layers, in the order in which they are called.
        mean: Array with the mean of the output of each layer, over samples, positions and channels.
        std: Array with the square root of the variance over samples and positions, averaged over the channels.
        cosine: Array with the average cosine between the outputs for two different samples of a batch.
        stable_rank: Array with ``N / lambda_max`` of the N x N matrix of all cosines in a batch: from 1, if all samples
            have one direction, to the batch size, if all are orthogonal.
        gradient_norm: Array with the Euclidean norm of the gradient of the loss of a batch by the output; NaN without a
            loss.

    Example:

    >>> import keras, numpy as np
    >>> from keras_proxynorm.diagnostics import signal_propagation
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.ReLU(name="relu")])
    >>> print(signal_propagation(model, np.eye(4), verbose=0))  # orthogonal samples
    layer       mean        std     cosine  stable_rank  gradient_norm
    relu        0.25      0.433          0            4            nan
    """

    names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    cosine: np.ndarray
    stable_rank: np.ndarray
    gradient_norm: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in ("mean", "std", "cosine", "stable_rank", "gradient_norm")}

    def plot(self, axes: Any = None, label: str | None = None) -> np.ndarray:
        """Plots each quantity against depth, in a panel of its own.

        Args:
            axes: Sequence of as many `matplotlib.axes.Axes`, such as those of another result to compare with. Defaults
                to a new figure.
            label: Optional name for the legend of the first panel.

        Returns:
            An array of `matplotlib.axes.Axes`.

        Raises:
            ImportError: If matplotlib is not installed: ``pip install "keras_proxynorm[plots]"``.
        """
        return plot_signal(self, axes, label)


def signal_propagation(
    model: keras.Model,
    data: Any,
    layers: LayerChoice = None,
    *,
    loss: LossLike = None,
    training: bool = True,
    batch_size: int = 32,
    steps: int | None = None,
    verbose: int = 1,
) -> SignalPropagation:
    """Measures activations, similarity of samples and gradients of each layer, to be plotted against depth.

    Each quantity is that of the output of a layer: mean and standard deviation over all data, the others for each batch
    and averaged over the batches, weighted by their numbers of samples. Gradients need targets and a loss. The model
    runs as it is, once for the activations and once more for the gradients, and is not changed.

    Args:
        model: A built Keras model of any kind.
        data: A tuple ``(inputs, targets)``, or only inputs to leave out gradients, or a dataset of such batches, as
            for `fit`.
        layers: As in `power_decomposition`. Defaults to all layers whose output is an activation: activation layers and
            layers that end with a nonlinear activation, including those of this package. "Beyond BatchNorm" takes the
            gradients by the outputs of convolutions: ``layers=keras.layers.Conv2D``.
        loss: A name, a function or an instance of a loss. Defaults to the one that the model is compiled with.
        training: Whether the model is called as in training: batch normalizations use the statistics of the batch, and
            their moving averages do not change. Defaults to True.
        batch_size, steps, verbose: As in `power_decomposition`.

    Returns:
        A `SignalPropagation`.

    Raises:
        ValueError: If the model is not built, has no such layers, or if an argument is not as described above.

    Example:

    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.diagnostics import signal_propagation
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras_proxynorm.LayerNormProxy()])
    >>> images = np.random.normal(size=(64, 8, 8, 3))
    >>> result = signal_propagation(model, (images, images), loss="mse", verbose=0)
    >>> bool(result.gradient_norm[0] > 0)
    True

    References:

    - [Lubana et al., 2021](https://arxiv.org/abs/2106.05956), "Beyond BatchNorm"
    - [Bjorck et al., 2018](https://arxiv.org/abs/1806.02375), "Understanding Batch Normalization"
    """
    check_built_model(model)
    chosen = choose(model, layers, has_activation, "layer whose output is an activation")
    # Gradients are left out if there is no loss, or no targets for the compiled loss.
    has_loss = loss is not None or (getattr(model, "compiled", False) and getattr(model, "loss", None) is not None)
    compute_loss = batch_loss(model, loss, training) if has_loss else None
    signals: dict[tuple[str, int], _Signal] = {}
    for inputs, targets, weights in batches(data, batch_size, steps, verbose):
        calls, outputs = _outputs(model, chosen, inputs, training, signals)
        if compute_loss is not None and targets is not None:
            gradients = _gradient_norms(model, compute_loss, (inputs, targets, weights), chosen, calls, outputs)
            for key, length in gradients.items():
                signals[key].gradient_norms.update(np.full(len(keras.tree.flatten(inputs)[0]), length))
        elif loss is not None:
            raise ValueError("Argument `data` must have targets for `loss`: a tuple (inputs, targets). Received: none")
    check_all_seen(chosen, {name for name, _ in signals})
    rows = np.array([signal.row() for signal in signals.values()])
    return SignalPropagation(tuple(distinct(signals)), *rows.T)


class _Signal:
    """Accumulates the quantities of one layer over batches."""

    def __init__(self):
        self.channels = ChannelPowers()
        self.cosines, self.ranks, self.gradient_norms = StreamingMoments(), StreamingMoments(), StreamingMoments()

    def update(self, outputs, means, stddevs):
        self.channels.update(means, stddevs)
        cosine, rank = similarity(ops.convert_to_numpy(ops.cast(outputs, "float32")))
        # Weighted by samples, because the last batch may be smaller.
        if len(outputs) > 1:
            self.cosines.update(np.full(len(outputs), cosine))
        self.ranks.update(np.full(len(outputs), rank))

    def row(self):
        averages = (x.mean if x.count else np.nan for x in (self.cosines, self.ranks, self.gradient_norms))
        return (self.channels.mean.mean(), np.sqrt(self.channels.variance.mean()), *averages)


def similarity(outputs: np.ndarray) -> tuple[float, float]:
    """The average cosine between two samples, NaN for one sample, and the stable rank of the matrix of all cosines."""
    if not np.isfinite(outputs).all():
        return np.nan, np.nan
    samples = outputs.reshape(len(outputs), -1).astype("float64")
    lengths = np.linalg.norm(samples, axis=1, keepdims=True)
    samples = np.divide(samples, lengths, out=np.zeros_like(samples), where=lengths > 0)
    cosines = samples @ samples.T
    count = len(samples)
    largest = np.linalg.eigvalsh(cosines)[-1]
    average = (cosines.sum() - np.trace(cosines)) / (count * (count - 1)) if count > 1 else np.nan
    return average, np.trace(cosines) / largest if largest > 0 else 0.0


def _outputs(model, chosen, inputs, training, signals):
    """Runs the model and updates `signals`; returns the keys and the outputs of all calls."""
    calls: list[tuple[str, int]] = []
    outputs = []

    def observe(name, layer, call, args, kwargs):
        output = call(*args, **kwargs)
        if is_visible(output):
            means, stddevs = channel_moments(output, channel_axis(layer, len(output.shape)), by_sample=True)
            key = name, means.shape[-1]
            signals.setdefault(key, _Signal()).update(output, means, stddevs)
            calls.append(key)
            outputs.append(output)
        return output

    with observed(chosen, observe), left_unchanged(model.trainable_variables):
        model(inputs, training=training)
    return calls, outputs


def _gradient_norms(model, compute_loss, batch, chosen, calls, outputs):
    """The norm of the gradient of the loss by the outputs of all calls that share a key."""
    visible = {name: chosen[name] for name, _ in calls}
    # Small gradients would underflow in float16.
    loss_scale = 2.0**10 if "float16" in {keras.backend.standardize_dtype(x.dtype) for x in outputs} else 1.0

    def perturbed_loss(perturbations):
        left = iter(perturbations)

        def observe(name, layer, call, args, kwargs):
            return call(*args, **kwargs) + next(left)

        with observed(visible, observe), left_unchanged(model.trainable_variables):
            return loss_scale * compute_loss(*batch)

    _, gradients = value_and_gradients(perturbed_loss, [ops.zeros(x.shape, x.dtype) for x in outputs])
    by_key: dict[tuple[str, int], list] = {key: [] for key in calls}
    for key, gradient in zip(calls, gradients, strict=True):
        by_key[key].append(gradient)
    return {key: norm(several) / loss_scale for key, several in by_key.items()}
