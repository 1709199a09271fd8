"""Runs an exported artefact in a process that can import neither Keras nor this package.

    python -P run_artefact.py saved_model/1 tensorflow inputs.npz outputs.npz
    python -P run_artefact.py model.onnx onnxruntime inputs.npz outputs.npz --threads 2 --runs 50

`inputs.npz` has the arrays of several calls, "0/image", "1/image" and so on for an input "image"; `outputs.npz` gets
those of the outputs, named likewise, and with `--runs` the median of the seconds that a call took, as "seconds". The
exit status is 3 if the runtime cannot load the artefact.
"""

import argparse
import collections
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["CANNOT_LOAD", "RUNTIMES", "main"]

# Exit status.
CANNOT_LOAD = 3

# A function from named inputs to named outputs.
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def load_with_tensorflow(path: str, threads: int) -> Run:
    """A function from a dict of named arrays to a dict of named arrays, run by TensorFlow on the CPU."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.set_visible_devices([], "GPU")
    model = tf.saved_model.load(path)
    if "serving_default" not in model.signatures:
        sys.exit(f"The SavedModel must have the signature 'serving_default'. Received: {list(model.signatures)}")

    def run(inputs):
        # Not taken out of the model beforehand: a signature alone does not keep its variables alive.
        serve = model.signatures["serving_default"]
        _, specs = serve.structured_input_signature
        # In a .npz file bfloat16 is nothing but two bytes.
        arrays = {
            name: x.view(specs[name].dtype.as_numpy_dtype) if x.dtype.kind == "V" else x for name, x in inputs.items()
        }
        outputs = serve(**{name: tf.constant(x) for name, x in arrays.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return run


def load_with_onnxruntime(path: str, threads: int) -> Run:
    """The same, run by ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def load_with_openvino(path: str, threads: int) -> Run:
    """The same, run by OpenVINO."""
    import openvino

    # OpenVINO computes in bfloat16 by default where the CPU has it, with errors of tenths.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    core = openvino.Core()
    model = core.read_model(path)
    # Compiling adds the names of inner tensors to those of the outputs.
    names = [output.get_any_name() for output in model.outputs]
    compiled = core.compile_model(model, "CPU", settings)
    return lambda inputs: dict(zip(names, compiled(inputs).values(), strict=True))


RUNTIMES = {"tensorflow": load_with_tensorflow, "onnxruntime": load_with_onnxruntime, "openvino": load_with_openvino}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line that the module's docstring shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", help="the directory of a SavedModel's version, or an ONNX file")
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("inputs", help="the .npz file to read")
    parser.add_argument("outputs", help="the .npz file to write")
    parser.add_argument("--threads", type=int, default=1, help="threads of the runtime (default: 1)")
    parser.add_argument("--runs", type=int, default=0, help="calls to measure the time of (default: 0)")
    options = parser.parse_args(arguments)

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # From here on these cannot be imported.
    for package in ("keras", "keras_proxynorm", "tf_keras"):
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        run = RUNTIMES[options.runtime](options.artefact, options.threads)
    except Exception:  # whatever a runtime raises
        traceback.print_exc()
        sys.exit(CANNOT_LOAD)
    calls: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    with np.load(options.inputs) as file:
        for key, array in file.items():
            number, name = key.split("/", 1)
            calls[number][name] = array
    results: dict[str, Any] = {
        f"{number}/{name}": array for number, inputs in calls.items() for name, array in run(inputs).items()
    }
    if options.runs:
        results["seconds"] = median_seconds(run, next(iter(calls.values())), options.runs)
    np.savez(options.outputs, **results)


def median_seconds(run: Run, inputs: dict[str, np.ndarray], runs: int) -> float:
    """The median time of a call in seconds, after calls in which the runtime compiles and allocates."""
    seconds = []
    for _ in range(runs + min(runs, 10)):
        start = time.perf_counter()
        run(inputs)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[-runs:]))


if __name__ == "__main__":
    main()
