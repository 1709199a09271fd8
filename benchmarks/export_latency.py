"""Times exported models at batch size 1: what Keras's own `model.export` writes, and what this package writes.

    python benchmarks/export_latency.py

takes half an hour. The models have random scales, offsets and proxies, and images of 224x224 pixels; all that a
runtime runs takes turns in one process. The ratios are to Keras's export of the model with batch norm, and to its
export of the model with Keras's group norm, in the same runtime; Keras exports for any batch size, this package for 1.
Batch norm through this package is folded into constants, as other tools freeze it. OpenVINO runs the ONNX files, in
float32.
"""

import argparse
import importlib.metadata
import logging
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from measurement import in_own_process, medians_in_turns, results_file, write_results

MODELS = ["ResNet50V2", "EfficientNetB0", "MobileNetV3Small"]
NORMALIZATIONS = ["batch_norm", "group_norm", "group_norm_proxy", "layer_norm_proxy"]
RUNTIMES = {"onnxruntime": "model.onnx", "openvino": "model.onnx", "tensorflow": "saved_model/1"}
IMAGE_SHAPE = (224, 224, 3)


def build(name, normalization):
    """A classifier of keras.applications with a normalization, its norm parameters drawn at random."""
    import keras
    import numpy as np

    import keras_proxynorm

    model = getattr(keras.applications, name)(weights=None, input_shape=IMAGE_SHAPE, classifier_activation=None)
    if normalization != "batch_norm":
        model = keras_proxynorm.replace_normalization(model, normalization)
    random = np.random.default_rng(0)
    draws = {
        "gamma": lambda shape: random.uniform(0.7, 1.3, shape),
        "beta": lambda shape: random.normal(0, 0.2, shape),
        "proxy": lambda shape: random.normal(0, 0.1, shape),
        "moving_mean": lambda shape: random.normal(0, 0.2, shape),
        "moving_variance": lambda shape: random.uniform(0.5, 2, shape),
    }
    for weight in model.weights:
        if weight.name in draws:
            weight.assign(draws[weight.name](weight.shape))
    return model


def export(name, normalization, folder):
    """Writes a model in both formats, as Keras does and as this package does."""
    import numpy as np

    from keras_proxynorm.export import export_onnx, export_saved_model

    model = build(name, normalization)
    # Keras exports no model that was never called.
    model(np.zeros((1, *IMAGE_SHAPE), "float32"))
    # Keras's converter reports what it fails to optimize, at length.
    logging.disable(logging.ERROR)
    stock = Path(folder, f"{normalization}-keras")
    stock.mkdir()
    model.export(stock / "model.onnx", format="onnx", verbose=False)
    model.export(stock / "saved_model" / "1", format="tf_saved_model", verbose=False)
    ours = Path(folder, f"{normalization}-keras_proxynorm")
    export_onnx(model, ours / "model.onnx", verify=False)
    export_saved_model(model, ours / "saved_model", verify=False)


def measure(runtime, threads, folder, repeats):
    """The median time of a call of each artefact, in seconds."""
    import numpy as np

    from keras_proxynorm.export.run_artefact import RUNTIMES as LOADERS
    from keras_proxynorm.export.verification import artefact_inputs

    image = np.random.default_rng(0).uniform(0, 255, (1, *IMAGE_SHAPE)).astype("float32")
    contenders = {}
    for artefact in sorted(Path(folder).iterdir()):
        path = artefact / RUNTIMES[runtime]
        # Keras makes inputs of the constants of preprocessing layers.
        inputs = {
            name: image if shape[1:] == IMAGE_SHAPE else np.ones(shape, dtype)
            for name, (shape, dtype) in artefact_inputs(path).items()
        }
        run = LOADERS[runtime](str(path), threads)
        contenders[artefact.name] = lambda run=run, inputs=inputs: run(inputs)
    return medians_in_turns(contenders, repeats, warm_up=8)


def rows_of(name, runtime, threads, times, repeats):
    """The rows of the table and of the file."""
    for artefact, seconds in times.items():
        normalization, exporter = artefact.split("-")
        yield {
            "model": name,
            "runtime": runtime,
            "threads": threads,
            "normalization": normalization,
            "export": exporter,
            "repeats": repeats,
            "milliseconds": round(1e3 * seconds, 2),
            "to_batch_norm": round(seconds / times["batch_norm-keras"], 3),
            "to_group_norm": round(seconds / times["group_norm-keras"], 3),
        }


def main():
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: all three")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), help="default: all three")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--repeats", type=int, default=41, help="turns that are measured; default: 41")
    arguments = parser.parse_args()
    versions = [name + importlib.metadata.version(name) for name in arguments.runtimes if name != "tensorflow"]
    output = results_file("export_latency", *versions)
    print(
        f"{'model':<18}{'runtime':<13}{'threads':>7}  {'normalization':<18}{'export':<17}{'ms':>8}{'/BN':>7}{'/GN':>7}"
    )
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            for normalization in NORMALIZATIONS:
                in_own_process(export, name, normalization, folder)
            for runtime in arguments.runtimes:
                for threads in arguments.threads:
                    times = in_own_process(measure, runtime, threads, folder, arguments.repeats)
                    rows = list(rows_of(name, runtime, threads, times, arguments.repeats))
                    for row in rows:
                        print(
                            f"{row['model']:<18}{row['runtime']:<13}{row['threads']:>7}  {row['normalization']:<18}"
                            f"{row['export']:<17}{row['milliseconds']:>8.2f}{row['to_batch_norm']:>7.2f}"
                            f"{row['to_group_norm']:>7.2f}",
                            flush=True,
                        )
                    write_results(output, rows, keys=("model", "runtime", "threads", "normalization", "export"))
    print(f"Written to {os.path.relpath(output)}; its rows about something else are as they were.")


if __name__ == "__main__":
    main()
