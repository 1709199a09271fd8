"""The four power terms of the normalized pre-activation of each layer, which show collapse."""

from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np

from keras_proxynorm.arguments import check_built_model
from keras_proxynorm.diagnostics.batches import batches
from keras_proxynorm.diagnostics.plots import plot_powers
from keras_proxynorm.diagnostics.streaming import ChannelPowers
from keras_proxynorm.diagnostics.tables import LayerTable
from keras_proxynorm.observation.calls import check_all_seen, is_visible, left_unchanged, normalized_input, observed
from keras_proxynorm.observation.channels import channel_axis, channel_moments
from keras_proxynorm.observation.layers import LayerChoice, choose, distinct, is_normalization

__all__ = ["PowerDecomposition", "channel_powers", "decomposition", "power_decomposition"]


@dataclass(frozen=True, eq=False)
class PowerDecomposition(LayerTable):
    """The result of `power_decomposition`; as a string, a table of the fractions.

    Attributes:
        names: Tuple of the names of the layers, in the order in which they are called.
        powers: Array of shape ``(layers, 4)``: P1, P2, P3 and P4 of each layer.

    Example:

    >>> import numpy as np
    >>> from keras_proxynorm.diagnostics import PowerDecomposition
    >>> print(PowerDecomposition(("norm_1", "norm_2"), np.array([[0.0, 0.1, 0.8, 0.1], [0.45, 0.01, 0.43, 0.01]])))
    layer          P1         P2         P3         P4      power
    norm_1     0.0000     0.1000     0.8000     0.1000     1.0000
    norm_2     0.5000     0.0111     0.4778     0.0111     0.9000
    """

    names: tuple[str, ...]
    powers: np.ndarray
    number_format: ClassVar[str] = "{:.4f}"

    @property
    def fractions(self) -> np.ndarray:
        """`powers`, each row divided by its sum; 0 where that is 0."""
        total = self.powers.sum(axis=1, keepdims=True)
        return np.divide(self.powers, total, out=np.zeros_like(self.powers), where=total != 0)

    def columns(self) -> dict[str, np.ndarray]:
        return {**{f"P{i + 1}": self.fractions[:, i] for i in range(4)}, "power": self.powers.sum(axis=1)}

    def plot(self, ax: Any = None, title: str | None = None, legend: bool = True) -> Any:
        """Plots the fractions, stacked, against depth, as in Figure 2 of the paper.

        Args:
            ax: `matplotlib.axes.Axes` to draw into. Defaults to a new figure.
            title: Optional title.
            legend: Whether to explain the colours. Defaults to True.

        Returns:
            The `matplotlib.axes.Axes`.

        Raises:
            ImportError: If matplotlib is not installed: ``pip install "keras_proxynorm[plots]"``.
        """
        return plot_powers(self, ax, title, legend)


def power_decomposition(
    model: keras.Model,
    data: Any,
    layers: LayerChoice = None,
    *,
    training: bool = False,
    batch_size: int = 32,
    steps: int | None = None,
    verbose: int = 1,
) -> PowerDecomposition:
    """Decomposes the power of the normalized pre-activation of each normalization layer into four terms.

    With the mean ``m[x, c]`` and the standard deviation ``s[x, c]`` that channel ``c`` has over the positions of sample
    ``x``, and means ``E`` and variances ``Var`` over samples and channels,

        P1 = E_c[(E_x m)^2]  the channels' means: near 1, the channels are nearly constant (channel-wise collapse)
        P2 = E_c[Var_x m]    how much these differ between samples
        P3 = E_c[(E_x s)^2]  variation within a sample
        P4 = E_c[Var_x s]    how much that differs between samples; with P2 near 0 too, samples look alike

    and P1 + P2 + P3 + P4 is the mean square. They are those of the normalized ``y``, before gamma, beta, activation and
    proxy normalization. The model runs as it is and is not changed.

    Args:
        model: A built Keras model of any kind.
        data: Inputs, as for `fit`: an array, a structure of arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or
            an iterable of batches, such as a list of tuples; targets are ignored. It is iterated once.
        layers: Names, paths, classes, instances, a list of these, or a function of a layer. For layers that are not
            normalizations, the output is decomposed. Defaults to all batch, group, layer and RMS normalizations of
            Keras and the layers of this package, at any depth. Each call of a layer that is called several times for a
            batch counts as further samples.
        training: If True, batch normalizations use the statistics of the batch (their moving averages do not change),
            and dropout is active. Defaults to False.
        batch_size: Positive integer, for arrays. Defaults to 32.
        steps: Positive integer, the maximum number of batches. Defaults to all.
        verbose: 1 for a progress bar, 0 for none. Defaults to 1.

    Returns:
        A `PowerDecomposition`: ``.names``, ``.powers``, ``.fractions``, ``.to_dict()``, ``.to_frame()``, ``.plot()``.
        Its memory does not depend on the size of the data.

    Raises:
        ValueError: If the model is not built, has no such layers, or if an argument is not as described above.

    Example:

    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.diagnostics import power_decomposition
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3)])
    >>> model.add(keras_proxynorm.LayerNormProxy(name="norm"))
    >>> result = power_decomposition(model, np.random.normal(size=(64, 8, 8, 3)), verbose=0)
    >>> result.names, result.powers.shape
    (('norm',), (1, 4))
    >>> bool(abs(result.powers.sum() - 1) < 0.01)
    True

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743), section 4
    """
    return decomposition(
        channel_powers(model, data, layers, training=training, batch_size=batch_size, steps=steps, verbose=verbose)
    )


def decomposition(measured: dict[str, tuple[keras.layers.Layer, ChannelPowers]]) -> PowerDecomposition:
    """The power terms of what `channel_powers` measured."""
    return PowerDecomposition(tuple(measured), np.stack([powers.terms for _, powers in measured.values()]))


def channel_powers(
    model: keras.Model,
    data: Any,
    layers: LayerChoice,
    *,
    training: bool,
    batch_size: int,
    steps: int | None,
    verbose: int,
) -> dict[str, tuple[keras.layers.Layer, ChannelPowers]]:
    """The layers and their statistics, by name, for the arguments of `power_decomposition`."""
    check_built_model(model)
    chosen = choose(model, layers, is_normalization, "normalization layer")
    measured: dict[tuple[str, int], ChannelPowers] = {}

    def observe(name, layer, call, args, kwargs):
        outputs = call(*args, **kwargs)
        value = normalized_input(layer, call, args, kwargs) if is_normalization(layer) else outputs
        if is_visible(value):
            means, stddevs = channel_moments(value, channel_axis(layer, len(value.shape)), by_sample=True)
            measured.setdefault((name, means.shape[-1]), ChannelPowers()).update(means, stddevs)
        return outputs

    for inputs, _, _ in batches(data, batch_size, steps, verbose):
        with observed(chosen, observe), left_unchanged(model.trainable_variables):
            model(inputs, training=training)
    check_all_seen(chosen, {name for name, _ in measured})
    observed_layers = [chosen[name] for name, _ in measured]
    return dict(zip(distinct(measured), zip(observed_layers, measured.values(), strict=True), strict=True))
