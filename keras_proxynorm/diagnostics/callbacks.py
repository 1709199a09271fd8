"""Keras callbacks that log the diagnostics during `fit`."""

import abc
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_proxynorm.arguments import as_positive_integer
from keras_proxynorm.diagnostics.batches import Batch, batches
from keras_proxynorm.diagnostics.gradients import LossLike
from keras_proxynorm.diagnostics.landscape import loss_landscape
from keras_proxynorm.diagnostics.power import power_decomposition
from keras_proxynorm.diagnostics.propagation import signal_propagation
from keras_proxynorm.observation.layers import LayerChoice

__all__ = ["LogLossLandscape", "LogPowerDecomposition", "LogSignalPropagation"]


class _Log(keras.callbacks.Callback, abc.ABC):
    """Measures at the end of epochs and logs the results."""

    # The arguments of the diagnosis but model and data.
    options: dict[str, Any]
    # The default prefix of the names of the numbers.
    prefix: str

    def __init__(self, data: Any, every: int, log_dir: str | os.PathLike | None, name: str | None) -> None:
        super().__init__()
        if isinstance(data, Iterator):
            raise ValueError(
                "Argument `data` must be data that can be iterated repeatedly, such as arrays or a dataset. "
                f"Received: data of the type {type(data).__name__}"
            )
        self.data = data
        self.name = self.prefix if name is None else name
        self.every = as_positive_integer("every", every)
        if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
            raise ImportError('Logging to TensorBoard needs: pip install "keras_proxynorm[tensorboard]"')
        self.log_dir = None if log_dir is None else os.fspath(log_dir)
        self.results: dict[int, object] = {}
        self._writer: Any = None

    @abc.abstractmethod
    def measure(self) -> tuple[Any, dict[str, float]]:
        """Measures once, now; returns the result and its numbers by name."""

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.results = {}

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if (epoch + 1) % self.every:
            return
        self.results[epoch], numbers = self.measure()
        # Not into `logs`, which the progress bar would print.
        history = getattr(getattr(self.model, "history", None), "history", {})
        for name, value in numbers.items():
            history.setdefault(f"{self.name}/{name}", []).append(value)
        if self.log_dir is not None:
            self._write(self.log_dir, epoch, numbers)

    def on_train_end(self, logs: dict | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, log_dir, epoch, numbers):
        import tensorflow as tf

        if self._writer is None:
            self._writer = tf.summary.create_file_writer(os.path.join(log_dir, "diagnostics"))
        with self._writer.as_default():
            for name, value in numbers.items():
                tf.summary.scalar(f"{self.name}/{name}", value, step=epoch)
        self._writer.flush()


class LogPowerDecomposition(_Log):
    """Logs the power decomposition of the normalization layers every few epochs of `fit`.

    The numbers are added to the History of `fit`, under the names ``"power_decomposition/P1/<layer>"`` to ``P4``, one
    for each epoch with a measurement, and to TensorBoard under the same names. ``.results`` has the results by epoch.

    It costs a forward pass over the data that is not compiled, and takes as long as 2 to 3 training steps on as many
    samples (measured with ResNet50V2 and EfficientNetB0 on a CPU, as for the other callbacks).

    Args:
        data: Inputs, as in `power_decomposition`. Some tens of samples suffice.
        every: Positive integer: the number of epochs between measurements. Defaults to 1.
        log_dir: Optional directory of TensorBoard, such as that of `keras.callbacks.TensorBoard`; the callback writes
            to the subdirectory "diagnostics".
        name: Prefix of the names of the numbers, to distinguish two of these callbacks. Defaults to
            ``"power_decomposition"``.
        layers, training, batch_size, steps: As in `power_decomposition`.

    Raises:
        ImportError: If `log_dir` is given and tensorboard is not installed.
        ValueError: If an argument is not as described above.

    Example:

    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.diagnostics import LogPowerDecomposition
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras_proxynorm.LayerNormProxy(name="norm")])
    >>> model.compile("sgd", "mse")
    >>> images = np.random.normal(size=(64, 8, 8, 3))
    >>> history = model.fit(images, images, epochs=2, callbacks=[LogPowerDecomposition(images)], verbose=0)
    >>> len(history.history["power_decomposition/P1/norm"])
    2
    """

    prefix = "power_decomposition"

    def __init__(
        self,
        data: Any,
        layers: LayerChoice = None,
        *,
        every: int = 1,
        log_dir: str | os.PathLike | None = None,
        name: str | None = None,
        training: bool = False,
        batch_size: int = 32,
        steps: int | None = None,
    ) -> None:
        super().__init__(data, every, log_dir, name)
        # For its errors, which come before an epoch of training then.
        batches(data, batch_size, steps)
        self.options = {
            "layers": layers,
            "training": training,
            "batch_size": batch_size,
            "steps": steps,
        }

    def measure(self) -> tuple[Any, dict[str, float]]:
        result = power_decomposition(self.model, self.data, verbose=0, **self.options)
        rows = zip(result.names, result.fractions.tolist(), strict=True)
        return result, {f"P{i + 1}/{name}": row[i] for name, row in rows for i in range(4)}


class LogSignalPropagation(_Log):
    """Logs the signal propagation of the network every few epochs of `fit`.

    The numbers are added to the History of `fit`, under names such as ``"signal_propagation/cosine/<layer>"``, one for
    each epoch with a measurement, and to TensorBoard under the same names. ``.results`` has the results by epoch.

    It costs two forward passes and a backward pass over the data that are not compiled, and takes as long as 5 to 7
    training steps on as many samples.

    Args:
        data: A tuple ``(inputs, targets)``, or only inputs to leave out gradients, or a dataset of such batches, as in
            `signal_propagation`.
        every, log_dir, name: As in `LogPowerDecomposition`. The name defaults to ``"signal_propagation"``.
        layers, loss, training, batch_size, steps: As in `signal_propagation`.

    Raises:
        ImportError: If `log_dir` is given and tensorboard is not installed.
        ValueError: If an argument is not as described above.

    Example:

    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.diagnostics import LogSignalPropagation
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras_proxynorm.LayerNormProxy(name="norm")])
    >>> model.compile("sgd", "mse")
    >>> images = np.random.normal(size=(64, 8, 8, 3))
    >>> history = model.fit(images, images, epochs=2, callbacks=[LogSignalPropagation((images, images))], verbose=0)
    >>> len(history.history["signal_propagation/cosine/norm"])
    2
    """

    prefix = "signal_propagation"

    def __init__(
        self,
        data: Any,
        layers: LayerChoice = None,
        *,
        loss: LossLike = None,
        every: int = 1,
        log_dir: str | os.PathLike | None = None,
        name: str | None = None,
        training: bool = True,
        batch_size: int = 32,
        steps: int | None = None,
    ) -> None:
        super().__init__(data, every, log_dir, name)
        # For its errors, which come before an epoch of training then.
        batches(data, batch_size, steps)
        self.options = {
            "layers": layers,
            "loss": loss,
            "training": training,
            "batch_size": batch_size,
            "steps": steps,
        }

    def measure(self) -> tuple[Any, dict[str, float]]:
        result = signal_propagation(self.model, self.data, verbose=0, **self.options)
        columns = result.columns()
        # Without targets; after a training that failed, all numbers are NaN.
        if np.isnan(columns["gradient_norm"]).all() and not np.isnan(columns["mean"]).all():
            del columns["gradient_norm"]
        return result, {
            f"{title}/{name}": value
            for title, values in columns.items()
            for name, value in zip(result.names, values.tolist(), strict=True)
        }


class LogLossLandscape(_Log):
    """Logs the loss along the gradient every few epochs of `fit`.

    The numbers of `LossLandscape.to_dict` are added to the History of `fit`, under names such as
    ``"loss_landscape/effective_smoothness"``, one for each epoch with a measurement, and to TensorBoard under the same
    names. ``.results`` has the results by epoch.

    It costs a compilation each time, and up to ``len(step_sizes) + 7`` forward and backward passes of the batch: with
    the default step sizes it takes as long as 40 to 50 training steps.

    Args:
        batch: A tuple ``(inputs, targets)`` or ``(inputs, targets, sample_weights)``, as in `loss_landscape`.
        every, log_dir, name: As in `LogPowerDecomposition`. The name defaults to ``"loss_landscape"``.
        loss, step_sizes, divergence, training: As in `loss_landscape`.

    Raises:
        ImportError: If `log_dir` is given and tensorboard is not installed.
        ValueError: If an argument is not as described above.

    Example:

    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.diagnostics import LogLossLandscape
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras_proxynorm.LayerNormProxy(name="norm")])
    >>> model.compile("sgd", "mse")
    >>> images = np.random.normal(size=(64, 8, 8, 3))
    >>> history = model.fit(images, images, epochs=2, callbacks=[LogLossLandscape((images, images))], verbose=0)
    >>> len(history.history["loss_landscape/effective_smoothness"])
    2
    """

    prefix = "loss_landscape"

    def __init__(
        self,
        batch: Batch,
        *,
        loss: LossLike = None,
        every: int = 1,
        log_dir: str | os.PathLike | None = None,
        name: str | None = None,
        step_sizes: Sequence[float] | None = None,
        divergence: float = 1.0,
        training: bool = True,
    ) -> None:
        super().__init__(batch, every, log_dir, name)
        self.options = {
            "loss": loss,
            "step_sizes": step_sizes,
            "divergence": divergence,
            "training": training,
        }

    def measure(self) -> tuple[Any, dict[str, float]]:
        result = loss_landscape(self.model, self.data, **self.options)
        return result, result.to_dict()
