"""Reports in words which layers of a network have collapsed, and what to try."""

import textwrap
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_proxynorm.diagnostics.power import PowerDecomposition, channel_powers, decomposition
from keras_proxynorm.diagnostics.tables import LayerTable
from keras_proxynorm.layers import ProxyActivation
from keras_proxynorm.layers.proxy_normalization import ProxyNormalizationLayer
from keras_proxynorm.observation.layers import LayerChoice

__all__ = ["CollapseReport", "Finding", "collapse_report"]

# Thresholds are choices of this package: the paper names these states without any.
_COLLAPSED = 0.5
_SAMPLES_ALIKE = 2e-3
_VANISHED = 1e-2
_FAR_MEAN = 0.5
_FAR_STDDEV = 2.0


@dataclass(frozen=True)
class Finding:
    """A problem of a layer.

    Attributes:
        layer: Name of the layer.
        problem: ``"values not finite"``, ``"vanished input"``, ``"channel-wise collapse"``, ``"no instance
            variability"``, ``"proxy far from data"`` or ``"moving statistics far from data"``.
        evidence: The numbers that show it, in words.
        advice: What to try.

    Example:

    >>> from keras_proxynorm.diagnostics import Finding
    >>> print(Finding("norm", "channel-wise collapse", "93% of its power is in the means of the channels", "..."))
    norm: channel-wise collapse: 93% of its power is in the means of the channels
    """

    layer: str
    problem: str
    evidence: str
    advice: str

    def __str__(self):
        return f"{self.layer}: {self.problem}: {self.evidence}"


@dataclass(frozen=True, eq=False)
class CollapseReport(LayerTable):
    """The result of `collapse_report`; as a string, in words.

    Attributes:
        names: Tuple of the names of the layers, in the order in which they are called.
        power: The `PowerDecomposition`.
        mean_distance: Array: the distance of the channels' means, in the normalized pre-activation, from the expected
            mean, in expected standard deviations, root mean square over the channels. Expected are the moments of the
            proxy, or 0 and 1 for a batch normalization; NaN for other layers.
        stddev_ratio: Array: the factor, in either direction, between the channels' standard deviations and the expected
            ones, median over the channels; NaN for other layers.
        findings: Tuple of `Finding`, by layer.

    Example:

    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.diagnostics import collapse_report
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3)])
    >>> model.add(keras_proxynorm.LayerNormProxy())
    >>> images = np.random.normal(size=(64, 8, 8, 3)) * np.random.uniform(0.5, 2, size=(64, 1, 1, 3))
    >>> print(collapse_report(model, images, verbose=0))
    Looked at 1 normalization layer and found nothing wrong.
    """

    names: tuple[str, ...]
    power: PowerDecomposition
    mean_distance: np.ndarray
    stddev_ratio: np.ndarray
    findings: tuple[Finding, ...]
    number_format: ClassVar[str] = "{:.4f}"

    def columns(self) -> dict[str, np.ndarray]:
        return {**self.power.columns(), "mean_distance": self.mean_distance, "stddev_ratio": self.stddev_ratio}

    def to_dict(self) -> dict[str, list]:
        """Lists by column: ``"layer"``, those of `columns`, and ``"problems"``, a list for each layer."""
        problems: dict[str, list] = {name: [] for name in self.names}
        for finding in self.findings:
            problems[finding.layer].append(finding.problem)
        return {**super().to_dict(), "problems": list(problems.values())}

    def __str__(self):
        count = len(self.names)
        looked = f"Looked at {count} normalization layer{'s' * (count > 1)}"
        if not self.findings:
            return f"{looked} and found nothing wrong."
        ill = len({finding.layer for finding in self.findings})
        lines = [f"{looked} and found something wrong with {ill}."]
        for problem in dict.fromkeys(finding.problem for finding in self.findings):
            found = [finding for finding in self.findings if finding.problem == problem]
            lines += [
                "",
                *textwrap.wrap(f"{problem.capitalize()} ({len(found)} of {count} layers): {_MEANING[problem]}", 100),
            ]
            lines += [f"  {finding.layer}: {finding.evidence}" for finding in found]
            for advice in dict.fromkeys(finding.advice for finding in found):
                lines += textwrap.wrap(f"Try {advice}", 100, initial_indent="  ", subsequent_indent="  ")
        return "\n".join(lines)

    def plot(self, ax: Any = None, title: str | None = None, legend: bool = True) -> Any:
        """Plots the power decomposition, see `PowerDecomposition.plot`."""
        return self.power.plot(ax, title, legend)


_MEANING = {
    "values not finite": "the input has infinite values or NaN, and so has all that follows.",
    "vanished input": "epsilon outweighs the variance of the input, and the output is nearly constant.",
    "channel-wise collapse": "channels are nearly constant over samples and positions, so that activations act on "
    "little but their means and the layers that follow are nearly linear.",
    "no instance variability": "samples have the same mean and standard deviation in each channel, so that properties "
    "such as contrast or the amount of a texture, by which these differ, are lost.",
    "proxy far from data": "proxy normalization works if the data resemble its Gaussian, and they do not.",
    "moving statistics far from data": "the moving averages that batch normalization uses at inference do not match "
    "the data.",
}


def collapse_report(
    model: keras.Model,
    data: Any,
    layers: LayerChoice = None,
    *,
    training: bool = False,
    batch_size: int = 32,
    steps: int | None = None,
    verbose: int = 1,
) -> CollapseReport:
    """Finds layers that collapse or whose proxies or moving statistics do not match the data, and says what to try.

    For each normalization layer it examines the four power terms, see `power_decomposition`, and the mean and the
    standard deviation of each channel of the normalized pre-activation:

    - channel-wise collapse: P1, the share of the channels' means, is at least 0.5;
    - no instance variability: P2 + P4, the difference between samples, is less than 0.002 of P2 + P3 + P4, as with
      instance normalization, or for data that are noise;
    - proxy far from data: `mean_distance` is more than 0.5, or `stddev_ratio` more than 2;
    - moving statistics far from data: the same for batch normalization with ``training=False``, as in any network that
      is not trained yet; nothing else is reported of such a layer;
    - vanished input: the mean square of the normalized input is below 0.01, because epsilon outweighs the variance; not
      for batch normalization;
    - values not finite.

    The thresholds are choices of this package.

    Args:
        model: A built Keras model of any kind.
        data: Inputs, as in `power_decomposition`.
        layers: Normalization layers, as in `power_decomposition`. Defaults to all.
        training: If True, batch normalizations use the statistics of the batch. Defaults to False.
        batch_size, steps, verbose: As in `power_decomposition`.

    Returns:
        A `CollapseReport`; print it.

    Raises:
        ValueError: If the model is not built, has no such layers, or if an argument is not as described above.

    Example:

    >>> import keras, numpy as np
    >>> from keras_proxynorm.diagnostics import collapse_report
    >>> offsets = keras.initializers.RandomNormal(stddev=5.0)  # that drown the signal
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3, bias_initializer=offsets)])
    >>> model.add(keras.layers.GroupNormalization(groups=1, name="norm"))
    >>> report = collapse_report(model, np.random.normal(size=(64, 8, 8, 3)), verbose=0)
    >>> [(finding.layer, finding.problem) for finding in report.findings]
    [('norm', 'channel-wise collapse')]

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743)
    """
    measured = channel_powers(
        model, data, layers, training=training, batch_size=batch_size, steps=steps, verbose=verbose
    )
    power = decomposition(measured)
    distances = np.array([_distances(layer, powers, training) for layer, powers in measured.values()])
    findings = []
    for (name, (layer, powers)), terms, distance in zip(measured.items(), power.powers, distances, strict=True):
        findings += _findings(name, layer, powers, terms, *distance)
    return CollapseReport(power.names, power, distances[:, 0], distances[:, 1], tuple(findings))


def _distances(layer, powers, training):
    """Distance of the means and ratio of the standard deviations between the channels and those that are expected."""
    mean, stddev = np.zeros_like(powers.mean), np.ones_like(powers.mean)
    if isinstance(layer, ProxyNormalizationLayer):
        if layer.proxy is None:
            return np.nan, np.nan
        mean, stddev = (ops.convert_to_numpy(x).astype("float64") for x in (layer.proxy_mean, layer.proxy_stddev))
    elif not isinstance(layer, keras.layers.BatchNormalization) or (training and layer.trainable):
        return np.nan, np.nan
    variance = powers.variance
    if isinstance(layer, keras.layers.BatchNormalization):
        # It divides by the moving variance plus epsilon, so channels of variance 0 are not expected to have 1.
        moving = ops.convert_to_numpy(layer.moving_variance).astype("float64")
        variance = variance + layer.epsilon / (moving + layer.epsilon)
    tiny = np.finfo("float32").tiny
    distance = np.sqrt(np.mean(np.square((powers.mean - mean) / np.maximum(stddev, tiny))))
    ratios = np.log(np.maximum(np.sqrt(variance), tiny) / np.maximum(stddev, tiny))
    return distance, np.exp(np.median(np.abs(ratios)))


def _findings(name, layer, powers, terms, mean_distance, stddev_ratio):
    total = terms.sum()
    if not np.isfinite(total):
        advice = "a smaller learning rate, and check the data and the preceding layers."
        yield Finding(name, "values not finite", f"its mean square is {total}", advice)
        return
    has_proxy = isinstance(layer, ProxyNormalizationLayer) and layer.proxy is not None
    is_batch_norm = isinstance(layer, keras.layers.BatchNormalization)
    p1, p2, p3, p4 = terms / (total or 1)
    differs = (p2 + p4) / (p2 + p3 + p4) if p3 > 0 else 1.0
    far = mean_distance > _FAR_MEAN or stddev_ratio > _FAR_STDDEV
    evidence = f"means differ by {mean_distance:.2g} standard deviations, these by a factor of {stddev_ratio:.2g}"
    if is_batch_norm and far:
        # Its output is not normalized then, so the power terms mean nothing.
        advice = "more training steps or a smaller momentum, or training=True here to use the statistics of the batch."
        yield Finding(name, "moving statistics far from data", evidence, advice)
        return
    if total < _VANISHED and not is_batch_norm and not isinstance(layer, ProxyActivation):
        advice = "a smaller epsilon, or larger weights in the preceding layers."
        yield Finding(name, "vanished input", f"the mean square of its normalized input is {total:.2g}, not 1", advice)
        return
    if p1 >= _COLLAPSED:
        evidence_p1 = f"{p1:.0%} of its power is in the means of the channels"
        yield Finding(name, "channel-wise collapse", evidence_p1, _collapse_advice(layer))
    # Without positions, only samples can differ.
    if differs < _SAMPLES_ALIKE and powers.samples > 1:
        if getattr(layer, "groups", None) in (-1, len(powers.mean)):
            advice = "fewer groups: with one channel in each, all differences between samples are normalized away."
        else:
            advice = "data that differ more, if these are noise, or fewer groups."
        yield Finding(name, "no instance variability", f"{differs:.2%} of the variation is between samples", advice)
    if has_proxy and far:
        if not layer.trainable:
            advice = "layer.trainable = True, so that the proxy follows the data."
        elif not layer.learn_proxy:
            advice = "learn_proxy=True, so that the proxy follows the data."
        else:
            advice = "further training, or less weight decay on the proxies."
        yield Finding(name, "proxy far from data", evidence, advice)


def _collapse_advice(layer):
    if isinstance(layer, keras.layers.GroupNormalization):
        to = "layer_norm_proxy" if layer.groups == 1 else "group_norm_proxy"
        return (
            "proxy normalization, which acts after the preceding activations: "
            f'replace_normalization(model, to="{to}", layers=keras.layers.GroupNormalization).'
        )
    if isinstance(layer, ProxyNormalizationLayer):
        return "checking whether the proxies of the preceding layers are far from the data."
    return "removing what its input has in common over positions and samples, such as offsets."
