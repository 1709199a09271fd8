"""Runs an artefact in a process of its own and compares it with its model."""

import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_proxynorm.arguments import argument_error, as_positive
from keras_proxynorm.export.atomic import local_path
from keras_proxynorm.export.open_sizes import has_open_sizes, sizes_to_try, with_fixed_sizes, with_traceable_resizing
from keras_proxynorm.export.precision import HALVES
from keras_proxynorm.export.repeatability import check_repeatable
from keras_proxynorm.export.run_artefact import CANNOT_LOAD
from keras_proxynorm.export.serving_function import serving_function

__all__ = [
    "CannotLoadError",
    "Comparison",
    "Verification",
    "VerificationError",
    "artefact_inputs",
    "fitting_runtimes",
    "run_in_fresh_process",
    "verify",
    "verify_served",
]

# For each set of inputs: how to draw floats, and the upper limit of integers, which may be the ids of tokens.
_INPUTS = {
    "normal": (lambda rng, shape: rng.standard_normal(shape), 2),
    "pixel": (lambda rng, shape: rng.uniform(0, 255, shape), 256),
    "zero": (lambda rng, shape: np.zeros(shape), 1),
    "constant": (lambda rng, shape: np.full(shape, 100.0), 1),
    "offset": (lambda rng, shape: 1e4 + rng.standard_normal(shape), 10),
    "tiny": (lambda rng, shape: 1e-6 * rng.standard_normal(shape), 2),
}
# Measured on correct artefacts: they differ from the model by up to twice the effect of a unit of rounding, which is
# less than 1e-4 for MobileNetV2 and ResNet50V2, folded or not, and 3e-3 where a normalization reads inputs of 1e4.
_ROUNDING_FACTOR = 15
_ROUNDING_DRAWS = 3
_SIZES_TO_COMPARE = 2
_UNITS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
_FLOAT32_UNIT = 2.0**-23
# What is smaller than this is 0 in float16; other dtypes have numbers that are small enough.
_SMALLEST_FLOAT16 = 2.0**-24


class VerificationError(ValueError):
    """Raised by `verify` for an artefact that does not compute what its model computes.

    Example:

    >>> import tempfile
    >>> import keras
    >>> from keras_proxynorm.export import export_onnx, verify, VerificationError
    >>> def make(name):
    ...     return keras.Sequential([keras.Input((4,), name=name), keras.layers.Dense(2)])
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = export_onnx(make("image"), directory + "/model.onnx")
    ...     try:
    ...         verify(make("audio"), path)
    ...     except VerificationError as error:
    ...         print(error)
    The artefact must have the inputs of `model`, audio: float32 (1, 4). Received: image: float32 (1, 4)
    """


class CannotLoadError(VerificationError):
    """Raised if a runtime cannot load an artefact, which is the runtime's fault if another one can."""


@dataclass(frozen=True)
class Comparison:
    """One output of an artefact compared with that of the model, for one set of inputs.

    Attributes:
        runtime: Name of the runtime that ran the artefact.
        output: Name of the output.
        inputs: Name of the set of inputs.
        batch_size: Integer.
        scale: The largest absolute value of the model's output.
        difference: The largest absolute difference, over elements that are finite in the model's output. Infinite if
            one is NaN in the artefact's.
        allowed: The largest `difference` that passes.
        sizes: The sizes of the inputs along the axes that follow the batch, if the artefact leaves some open; or None.
    """

    runtime: str
    output: str
    inputs: str
    batch_size: int
    scale: float
    difference: float
    allowed: float
    sizes: tuple[int, ...] | None = None

    @property
    def relative(self) -> float:
        """`difference` divided by `scale`; for an output that is all zero, 0 if there is no difference, or infinite."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.scale if self.scale else float("inf")

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed."""
        return self.difference <= self.allowed

    def __str__(self):
        sizes = "" if self.sizes is None else f", sizes {'x'.join(map(str, self.sizes))}"
        return (
            f"{self.runtime}: relative difference {self.relative:.1e} (absolute {self.difference:.1e}, "
            f"{self.allowed:.1e} allowed), output '{self.output}', {self.inputs} inputs, batch {self.batch_size}{sizes}"
        )


@dataclass(frozen=True)
class Verification:
    """The result of `verify`; as a string, a line for each runtime with its largest difference.

    Attributes:
        comparisons: Tuple of `Comparison`, one for each runtime, set of inputs and output.

    Example:

    >>> from keras_proxynorm.export.verification import Comparison, Verification
    >>> comparison = Comparison("onnxruntime", "logits", "pixel", 1, scale=2.0, difference=1e-6, allowed=2e-4)
    >>> print(Verification((comparison,)))
    onnxruntime: relative difference 5.0e-07 (absolute 1.0e-06, 2.0e-04 allowed), output 'logits', pixel inputs, batch 1
    """

    comparisons: tuple[Comparison, ...]

    @property
    def worst(self) -> dict[str, Comparison]:
        """The comparison with the largest relative difference, for each runtime by name."""
        worst: dict[str, Comparison] = {}
        for comparison in self.comparisons:
            other = worst.setdefault(comparison.runtime, comparison)
            if comparison.relative > other.relative:
                worst[comparison.runtime] = comparison
        return worst

    def __str__(self):
        return "\n".join(str(comparison) for comparison in self.worst.values())


def verify(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    runtimes: Sequence[str] | None = None,
    input_shape: Sequence | Mapping | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Verification:
    """Runs an artefact in a fresh process, without Keras and this package, and compares it with its model.

    Several sets of inputs are tried: standard normal, uniform from 0 to 255 as in images, all zero, all 100, with a
    mean of 1e4, and of size 1e-6. Integer inputs are 0, 1 and other small numbers. Sets that the model itself refuses,
    such as fractions for the ids of an embedding, are left out. An artefact that takes any batch size is run with 1 and
    3. One that leaves other sizes open is run at two sizes that the model takes, 64x64 and 96x64 for most models.

    The difference of an output is the largest over its elements, divided by the largest absolute value of the model's
    output. A correct artefact sums in another order, so it differs from the model by rounding, by an amount that
    depends on the model and the input. The function therefore measures, for each set of inputs, how far the model's
    own output moves when all weights and inputs move at random by a unit in the last place (of float32, or of the half
    precision that the model computes in), and allows fifteen times that where it is more than `tolerance`. The model is
    evaluated on the CPU. Where the model computes in half precision, an artefact may be float32.

    If one of several runtimes cannot load the artefact, as OpenVINO cannot load some recurrent layers, the others
    decide, and a warning names that one. It is an error if `runtimes` names it.

    Args:
        model: The Keras model, on the TensorFlow backend.
        path: The directory of a SavedModel's version, or an ONNX file.
        runtimes: List of the runtimes that run the artefact: ``"tensorflow"`` for a SavedModel, ``"onnxruntime"`` and
            ``"openvino"`` for ONNX. Defaults to those that are installed. All compute in float32 on the CPU.
        input_shape: As for the export; needed for subclassed models only.
        tolerance: Positive float, the relative difference that is always allowed. Defaults to 1e-4.
        seed: Integer, seed of the random inputs.

    Returns:
        A `Verification`, with the differences for each runtime, set of inputs and output.

    Raises:
        VerificationError: If a difference is larger than allowed; if names, shapes or dtypes are not the model's; if an
            output is NaN or infinite where the model's is finite; if a process fails; or if no runtime can load the
            artefact. A ValueError.
        ImportError: If no runtime, or one of `runtimes`, is not installed.
        RuntimeError: If the Keras backend is not TensorFlow.
        ValueError: If an argument is not of the form above, or if the model draws random numbers at inference.

    Example:

    >>> import tempfile
    >>> import keras, keras_proxynorm
    >>> from keras_proxynorm.export import export_onnx, verify
    >>> image = keras.Input((8, 8, 1), name="image")
    >>> features = keras_proxynorm.LayerNormProxy(name="features")(keras.layers.Conv2D(16, 3)(image))
    >>> model = keras.Model(image, features)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = export_onnx(model, directory + "/model.onnx")
    ...     verification = verify(model, path, runtimes=["onnxruntime"])
    >>> verification.worst["onnxruntime"].relative < 1e-4
    True
    """
    return verify_served(model, model, path, runtimes=runtimes, input_shape=input_shape, tolerance=tolerance, seed=seed)


def verify_served(
    model: keras.Model,
    served: keras.Model,
    path: str | os.PathLike,
    *,
    runtimes: Sequence[str] | None = None,
    input_shape: Sequence | Mapping | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Verification:
    """As `verify`, compared with `served`, a model that computes under the names of `model`."""
    artefact = local_path("path", path)
    tolerance = as_positive("tolerance", tolerance)
    inputs = artefact_inputs(artefact)
    calls = _reference_calls(model, served, inputs, input_shape, np.random.default_rng(seed))
    comparisons: list[Comparison] = []
    unloaded: list[CannotLoadError] = []
    for runtime in fitting_runtimes(artefact, runtimes):
        try:
            outputs, _ = run_in_fresh_process(artefact, runtime, [call.inputs for call in calls])
        except CannotLoadError as error:
            if runtimes is not None:
                raise
            unloaded.append(error)
            continue
        for call, received in zip(calls, outputs, strict=True):
            comparisons.extend(_compare(runtime, call, received, tolerance))
    if unloaded and not comparisons:
        raise unloaded[0]
    failed = [comparison for comparison in comparisons if not comparison.passed]
    if failed:
        advice = "" if failed[0].sizes is None else "Some operations cannot be converted with open sizes: fix them. "
        raise VerificationError(
            f"The artefact must compute what `model` computes, and does not for {len(failed)} of {len(comparisons)} "
            f"outputs that were compared. {advice}Received:\n{Verification(tuple(failed))}"
        )
    verification = Verification(tuple(comparisons))
    for failure in unloaded:
        warnings.warn(f"{', '.join(verification.worst)} computes what the model does, but {failure}", stacklevel=3)
    return verification


def artefact_inputs(path: Path) -> dict[str, tuple[tuple[int | None, ...], str]]:
    """Shape and dtype of the inputs of an artefact by name; a size that it leaves open is None.

    Raises:
        ValueError: If it is neither a SavedModel with the signature "serving_default" nor an ONNX file.
    """
    return _saved_model_inputs(path) if path.is_dir() else _onnx_inputs(path)


def _no_artefact(path, reason):
    expected = "the directory of a SavedModel's version, with the signature 'serving_default', or an ONNX file"
    return argument_error("path", str(path), f"{expected} ({reason})")


def _saved_model_inputs(path):
    import tensorflow as tf
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    try:
        graphs = SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs
    except (OSError, DecodeError) as error:
        raise _no_artefact(path, error) from error
    signatures = dict(graphs[0].signature_def) if len(graphs) == 1 else {}
    if "serving_default" not in signatures:
        raise _no_artefact(path, f"{len(graphs)} graphs with the signatures {sorted(signatures)}")
    return {
        name: (tuple(tf.TensorShape(info.tensor_shape)), tf.as_dtype(info.dtype).name)
        for name, info in signatures["serving_default"].inputs.items()
    }


def _onnx_inputs(path):
    import onnx

    inputs = {}
    for value in _onnx_graph(path).input:
        kind = value.type.tensor_type
        if not kind.elem_type:
            raise _no_artefact(path, f"its input '{value.name}' is no tensor")
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
        inputs[value.name] = shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return inputs


def _onnx_graph(path):
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise _no_artefact(path, error) from error


def fitting_runtimes(path: Path, runtimes: Sequence[str] | None = None) -> list[str]:
    """The runtimes that are installed and can run an artefact, or `runtimes`, checked.

    Raises:
        ValueError: If one of `runtimes` cannot run an artefact of this kind.
        ImportError: If one of `runtimes`, or all that could run it, are not installed.
    """
    fitting = ["tensorflow"] if path.is_dir() else ["onnxruntime", "openvino"]
    installed = [name for name in fitting if importlib.util.find_spec(name) is not None]
    if runtimes is None:
        runtimes, missing = installed, [] if installed else fitting[:1]
    elif not isinstance(runtimes, (list, tuple)) or not runtimes or not set(runtimes) <= set(fitting):
        raise ValueError(
            f"Argument `runtimes` must be None or a list of names from {fitting}, which can run the artefact. "
            f"Received: runtimes={runtimes!r}"
        )
    else:
        missing = [name for name in runtimes if name not in installed]
    if missing:
        raise ImportError(
            f"Running an artefact, as exports do unless verify=False, needs: pip install {' '.join(missing)}"
        )
    return list(runtimes)


def run_in_fresh_process(
    path: Path, runtime: str, calls: Sequence[Mapping[str, np.ndarray]], *, threads: int = 1, runs: int = 0
) -> tuple[list[dict[str, np.ndarray]], float | None]:
    """Runs an artefact in a process of its own.

    Args:
        path: The artefact.
        runtime: The runtime that runs it.
        calls: The inputs of each call, by name.
        threads: Integer, the threads that the runtime may use.
        runs: Integer, calls to measure the time of, with the inputs of the first call.

    Returns:
        ``(outputs, seconds)``: the outputs of each call, by name, and the median time of a call, None without `runs`.

    Raises:
        CannotLoadError: If the runtime cannot load the artefact, with the end of what the process wrote to stderr.
        VerificationError: If the process fails later, likewise.
    """
    with tempfile.TemporaryDirectory() as directory:
        inputs_path, outputs_path = Path(directory, "inputs.npz"), Path(directory, "outputs.npz")
        arrays: dict[str, Any] = {f"{i}/{name}": x for i, inputs in enumerate(calls) for name, x in inputs.items()}
        np.savez(inputs_path, **arrays)
        # -P keeps this folder, which has an onnx.py, off the module path. -I would, too, but also hides packages that
        # were installed for the user alone.
        command = [sys.executable, "-P", Path(__file__).with_name("run_artefact.py"), path.absolute(), runtime]
        command += [inputs_path, outputs_path, f"--threads={threads}", f"--runs={runs}"]
        done = subprocess.run(
            list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        end = "\n".join(done.stderr.strip().splitlines()[-5:])
        if done.returncode == CANNOT_LOAD:
            raise CannotLoadError(f"{runtime} cannot load the artefact{_possible_reason(path)}. Received:\n{end}")
        if done.returncode != 0 or not outputs_path.exists():
            raise VerificationError(
                f"The artefact must run in {runtime}. Received: exit status {done.returncode} of the process that ran "
                f"{str(path)!r}, which ended with:\n{end}"
            )
        outputs: list[dict[str, np.ndarray]] = [{} for _ in calls]
        seconds = None
        with np.load(outputs_path) as file:
            for key, array in file.items():
                if key == "seconds":
                    seconds = float(array)
                else:
                    number, name = key.split("/", 1)
                    outputs[int(number)][name] = array
    return outputs, seconds


def _possible_reason(path):
    """What the artefact has that not every runtime can load, as the end of a sentence; or nothing."""
    if path.is_dir():
        return ""
    import onnx

    graph = _onnx_graph(path)
    loops = sorted({node.op_type for node in graph.node} & {"GRU", "LSTM", "Loop", "RNN", "Scan"})
    if loops:
        return f". The reason may be recurrent layers ({', '.join(loops)})"
    dtypes = {onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name for tensor in graph.initializer}
    for dtype in dtypes & {"bfloat16", "float64"}:
        return (
            f". The reason may be {dtype}, in which it cannot compute all operations. Make the model again under the "
            "policy 'float32' and load its weights there with `load_weights`, or use export_saved_model"
        )
    return ""


@dataclass(frozen=True)
class _Call:
    """Inputs, the model's outputs, and the effect of a unit of rounding on each output."""

    name: str
    batch_size: int
    sizes: tuple[int, ...] | None
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    rounding: dict[str, float]


def _reference_calls(model, served, inputs, input_shape, rng):
    """The calls to make of an artefact, with the outputs to expect."""
    import tensorflow as tf

    batch_size = next((shape[0] for shape, _ in inputs.values() if shape), None)
    own = {tensor.name: tensor.shape[1:] for tensor in getattr(model, "inputs", None) or ()}
    if input_shape is None and set(own) == set(inputs) and any(None in shape for shape in own.values()):
        input_shape = {name: shape[1:] for name, (shape, _) in inputs.items()}
    serve, signature = serving_function(model, batch_size, input_shape, served=served)
    if has_open_sizes(signature):
        served = with_traceable_resizing(served)
        serve, _ = serving_function(model, batch_size, input_shape, served=served)
    expected = {spec.name: (tuple(spec.shape), spec.dtype.name) for spec in signature}
    if inputs != expected:
        raise VerificationError(
            f"The artefact must have the inputs of `model`, {_listed(expected)}. Received: {_listed(inputs)}"
        )
    check_repeatable(served, serve, signature)
    # On the CPU, because GPUs round float32 convolutions to TensorFloat-32.
    with tf.device("/CPU:0"):
        evaluate, weights, unit, smallest = _evaluation(served, serve, signature)
        calls: list[_Call] = []
        for sizes in sizes_to_try(spec.shape for spec in signature):
            taken = {call.sizes for call in calls}
            if len(taken) == _SIZES_TO_COMPARE:
                break
            for size, name in itertools.product((1, 3) if batch_size is None else (batch_size,), _INPUTS):
                drawn = {
                    spec.name: _draw(name, spec, with_fixed_sizes(spec.shape, size, sizes), rng) for spec in signature
                }
                try:
                    outputs = evaluate(weights, drawn)
                except tf.errors.InvalidArgumentError as error:
                    refusal = error
                    continue
                calls.append(_Call(name, size, sizes or None, drawn, outputs, dict.fromkeys(outputs, smallest)))
        if not calls:
            raise ValueError(f"Argument `model` must take inputs that are all zero, for one. Received:\n{refusal}")
        for _ in range(_ROUNDING_DRAWS):
            moved_weights = [tf.constant(_move(keras.ops.convert_to_numpy(x), unit, rng)) for x in weights]
            for call in calls:
                # An embedding refuses inputs that are moved: then no rounding is measured.
                with contextlib.suppress(tf.errors.InvalidArgumentError):
                    moved = evaluate(moved_weights, {name: _move(x, unit, rng) for name, x in call.inputs.items()})
                    for name, output in moved.items():
                        difference = _largest_difference(output, call.outputs[name])
                        if np.isfinite(difference):
                            call.rounding[name] = max(call.rounding[name], difference)
    for name in calls[0].outputs:
        if not any(np.isfinite(call.outputs[name]).any() for call in calls):
            raise ValueError(f"Argument `model` must give finite numbers. Received: output '{name}' has none")
    return calls


def _is_dtype_of(received: str, expected: str) -> bool:
    """Whether an artefact may give this dtype for that of the model."""
    return received == expected or (received == "float32" and expected in HALVES)


def _listed(inputs):
    return ", ".join(f"{name}: {dtype} {shape}" for name, (shape, dtype) in sorted(inputs.items()))


def _evaluation(model, serve, signature):
    """The model as a function of weights and inputs, its weights, and the relative and absolute unit of rounding."""
    import tensorflow as tf

    variables = [variable for variable in model.variables if "float" in variable.dtype]

    def function(values, inputs):
        # The user's model keeps its weights.
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return serve(*inputs)

    specs = [tf.TensorSpec(variable.shape, variable.dtype) for variable in variables]
    traced = tf.function(function, input_signature=[specs, signature], autograph=False)
    operations = traced.get_concrete_function().graph.get_operations()
    dtypes = {tensor.dtype.name for operation in operations for tensor in operation.outputs}
    unit = max(_UNITS.get(dtype, _FLOAT32_UNIT) for dtype in dtypes)
    smallest = _SMALLEST_FLOAT16 if "float16" in dtypes else 0.0

    def evaluate(values, inputs):
        outputs = traced(values, [tf.constant(inputs[spec.name]) for spec in signature])
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    # Not copied: these may be large.
    return evaluate, [tf.convert_to_tensor(variable) for variable in variables], unit, smallest


def _draw(name, spec, shape, rng):
    """An array for an input of the model."""
    dtype = spec.dtype
    floats, limit = _INPUTS[name]
    if dtype.is_floating:
        return floats(rng, shape).astype(dtype.as_numpy_dtype)
    if dtype.is_bool:
        return rng.integers(0, min(limit, 2), shape).astype(bool)
    if not dtype.is_integer:
        raise ValueError(
            "Argument `model` must take floats, integers or booleans; export others with verify=False. "
            f"Received: input '{spec.name}' of {dtype.name}"
        )
    if name == "constant":
        return np.ones(shape, dtype.as_numpy_dtype)
    return rng.integers(0, min(limit, dtype.max), shape).astype(dtype.as_numpy_dtype)


def _move(array, unit, rng):
    """Moves each element of an array of floats by a unit of rounding, up or down at random; others stay as they are."""
    if array.dtype.kind in "iub":
        return array
    up, down = array.dtype.type(1 + unit), array.dtype.type(1 - unit)
    return array * np.where(rng.integers(0, 2, array.shape, dtype=bool), up, down)


def _largest_difference(received, expected):
    """The largest absolute difference over the elements that are finite in `expected`; infinite for a NaN there."""
    finite = np.isfinite(expected)
    difference = np.abs(received[finite].astype("float64") - expected[finite].astype("float64"))
    return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0))


def _compare(runtime, call, received, tolerance):
    """A comparison for each output; names, shapes and dtypes must be equal."""
    if set(received) != set(call.outputs):
        raise VerificationError(
            f"The artefact must have the outputs of `model`, {sorted(call.outputs)}. "
            f"Received from {runtime}: {sorted(received)}"
        )
    for name, expected in call.outputs.items():
        output = received[name]
        # In a .npz file bfloat16 is nothing but two bytes.
        if output.dtype == "V2" and expected.dtype.name == "bfloat16":
            output = output.view(expected.dtype)
        if output.shape != expected.shape or not _is_dtype_of(output.dtype.name, expected.dtype.name):
            raise VerificationError(
                f"The artefact must give output '{name}' with shape {expected.shape} and dtype {expected.dtype}. "
                f"Received from {runtime}: {output.shape} and {output.dtype}"
            )
        scale = float(np.abs(expected[np.isfinite(expected)].astype("float64")).max(initial=0))
        difference = _largest_difference(output, expected)
        allowed = max(tolerance * scale, _ROUNDING_FACTOR * call.rounding[name])
        yield Comparison(runtime, name, call.name, call.batch_size, scale, difference, allowed, call.sizes)
