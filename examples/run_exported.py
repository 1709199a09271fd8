"""Runs an exported model without Keras and without keras_proxynorm: how to serve a SavedModel or an ONNX file.

    python run_exported.py saved_model/1 inputs.npz outputs.npz
    python run_exported.py model.onnx inputs.npz outputs.npz

`inputs.npz` has one array for each input of the model, under its name. The model was exported for batch size 1, so the
samples go through it one by one. `outputs.npz` gets the outputs under their names, and `latency_ms`, the median time of
a call in milliseconds.
"""

import os
import sys
import time
from pathlib import Path

# Proves that these are not needed: they cannot be imported from here on. A server of your own has no such line.
sys.modules.update({"keras": None, "keras_proxynorm": None})

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402


def load_saved_model(path):
    """A function from a dict of named arrays to a dict of named arrays, run by TensorFlow."""
    import tensorflow as tf

    model = tf.saved_model.load(path)

    def run(inputs):
        tensors = {name: tf.constant(array) for name, array in inputs.items()}
        # Looked up in each call, because a signature alone does not keep its variables alive.
        outputs = model.signatures["serving_default"](**tensors)
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return run


def load_onnx(path):
    """The same, run by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def main(artefact, inputs_path, outputs_path):
    run = load_onnx(artefact) if Path(artefact).suffix == ".onnx" else load_saved_model(artefact)
    with np.load(inputs_path) as file:
        inputs = dict(file)
    size = len(next(iter(inputs.values())))
    samples = [{name: array[i : i + 1] for name, array in inputs.items()} for i in range(size)]

    for sample in samples[:20]:
        run(sample)  # the first calls compile and allocate
    outputs, seconds = [], []
    for sample in samples:
        start = time.perf_counter()
        outputs.append(run(sample))
        seconds.append(time.perf_counter() - start)

    stacked = {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}
    np.savez(outputs_path, latency_ms=1000 * np.median(seconds), **stacked)


if __name__ == "__main__":
    main(*sys.argv[1:])
