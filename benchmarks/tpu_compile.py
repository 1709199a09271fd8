"""Compares what the TPU compiler makes of whole train steps with batch norm, group norm and proxy normalization.

    pip install "keras_proxynorm[tpu]"
    python benchmarks/tpu_compile.py --models blocks

No TPU is needed: the train step is traced by TensorFlow and compiled for a v5e, and never run. The models are three
blocks of 3x3 convolution, normalization and relu with 64 channels at batch size 64, which takes two minutes, and
ResNet50V2 on images of 224x224 pixels at batch size 32, which takes half an hour.
"""

import argparse
import csv
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# TensorFlow reads it when it is imported: errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from keras import layers

import keras_proxynorm

TPU = "v5e"
NORMALIZATIONS = ("batch_norm", "group_norm", "group_norm_proxy", "layer_norm_proxy")
PROXY_NORMALIZATIONS = NORMALIZATIONS[2:]
PRECISIONS = ("float32", "mixed_bfloat16")
# The most that proxy normalization may cost, as ratios to batch norm with ReLU.
LIMITS = {"bytes_accessed": 1.01, "temporary_bytes": 1.02}


def build_blocks():
    """Three blocks of convolution, batch norm and ReLU, and a classifier."""
    image = x = keras.Input((56, 56, 64))
    for _ in range(3):
        x = layers.Conv2D(64, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(10, dtype="float32")(x))


def build_resnet50v2():
    """ResNet50V2 as it comes with Keras, its logits in float32."""
    model = keras.applications.ResNet50V2(weights=None, include_top=False, pooling="avg", input_shape=(224, 224, 3))
    return keras.Model(model.inputs, layers.Dense(1000, dtype="float32")(model.output))


MODELS = {"blocks": (build_blocks, 64), "resnet50v2": (build_resnet50v2, 32)}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the compiler says of a program; `bytes_accessed` and `flops` are its estimates for one run of it."""

    bytes_accessed: int
    temporary_bytes: int
    flops: int
    compile_seconds: float


def replace_batch_norm(model, normalization):
    """The model with another normalization, of 32 groups where it has groups."""
    if normalization == "batch_norm":
        return model
    return keras_proxynorm.replace_normalization(model, normalization, groups=32, min_channels_per_group=2)


def train_step_hlo(model, batch_size):
    """The train step of a classifier of images, as Keras defines it, as a serialized HLO module."""
    images = tf.zeros((batch_size, *model.input_shape[1:]))
    labels = tf.zeros((batch_size,), "int32")
    # Plain gradient descent: what other optimizers read and write, they do whatever the normalization.
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    # Variables must exist before the step is compiled: those of the optimizer, and those of the loss.
    model.optimizer.build(model.trainable_variables)
    model.compute_loss(y=labels, y_pred=tf.zeros((batch_size, model.output_shape[-1])))
    step = tf.function(lambda *batch: model.train_step(batch), jit_compile=True)
    # The layers would choose sums for the CPU on which they are traced.
    with keras_proxynorm.reduction("sum"):
        return step.experimental_get_compiler_ir(images, labels)(stage="hlo_serialized")


def compile_for_tpu(hlo):
    """Compiles a serialized HLO module for one TPU, in another process, and returns its `Statistics`."""
    with tempfile.TemporaryDirectory() as scratch:
        module, result = Path(scratch, "train_step.hlo"), Path(scratch, "statistics.json")
        module.write_bytes(hlo)
        script = Path(__file__).with_name("compile_for_tpu.py")
        child = subprocess.run([sys.executable, script, module, result], capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"{script.name} failed:\n{child.stderr}")
        return Statistics(**json.loads(result.read_text()))


def measure(model, normalization, precision):
    """The statistics of the train step of one of `MODELS` with a normalization at a precision."""
    build, batch_size = MODELS[model]
    policy = keras.config.dtype_policy()
    try:
        # On a machine with a GPU, too.
        with tf.device("CPU:0"):
            keras.config.set_dtype_policy(precision)
            hlo = train_step_hlo(replace_batch_norm(build(), normalization), batch_size)
    finally:
        keras.config.set_dtype_policy(policy)
        keras.utils.clear_session()
    return compile_for_tpu(hlo)


def ratio(results, key, field):
    """A figure as a ratio to that of batch norm, None if that is unknown."""
    model, precision, _ = key
    base = results.get((model, precision, "batch_norm"))
    return base and getattr(results[key], field) / getattr(base, field)


def excesses(results):
    """One line for each figure of proxy normalization that is over its limit."""
    lines = []
    for key in results:
        for field, limit in LIMITS.items():
            found = ratio(results, key, field)
            if key[2] in PROXY_NORMALIZATIONS and found is not None and found > limit:
                lines.append(f"{' '.join(key)}: {field} is {found:.4f} of batch norm's; the limit is {limit}")
    return lines


def results_file():
    """Where the results go; what they depend on is in its name."""
    versions = "-".join(
        name + importlib.metadata.version(package)
        for name, package in (("tf", "tensorflow"), ("keras", "keras"), ("jax", "jax"), ("libtpu", "libtpu"))
    )
    return Path(__file__).with_name("results") / f"tpu_compile-{TPU}-{versions}.csv"


COLUMNS = (
    "model",
    "precision",
    "normalization",
    *(field.name for field in dataclasses.fields(Statistics)),
    *(f"{field}_ratio" for field in LIMITS),
)


def read_results(path):
    """The results of earlier runs, as a dictionary by model, precision and normalization."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (row["model"], row["precision"], row["normalization"]): Statistics(
                **{field.name: field.type(row[field.name]) for field in dataclasses.fields(Statistics)}
            )
            for row in csv.DictReader(file)
        }


def write_results(path, results):
    """Writes all results, in the order of the command line's choices."""
    choices = (list(MODELS), PRECISIONS, NORMALIZATIONS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key in sorted(results, key=lambda key: [list(c).index(k) for c, k in zip(choices, key, strict=True)]):
            ratios = (ratio(results, key, field) for field in LIMITS)
            writer.writerow(
                [*key, *dataclasses.astuple(results[key]), *("" if r is None else f"{r:.4f}" for r in ratios)]
            )


def print_row(results, key):
    """One line of the table."""
    statistics = results[key]
    cells = [f"{key[0]:<12}{key[1]:<16}{key[2]:<18}"]
    for field in LIMITS:
        found = ratio(results, key, field)
        cells.append(f"{getattr(statistics, field) / 1e6:>10.1f}{'-' if found is None else format(found, '.4f'):>8}")
    cells.append(f"{statistics.flops / 1e9:>10.1f}{statistics.compile_seconds:>10.1f}")
    print("".join(cells), flush=True)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def add_choice(option, choices):
        parser.add_argument(option, nargs="+", choices=choices, default=choices, help=f"default: {' '.join(choices)}")

    add_choice("--models", tuple(MODELS))
    add_choice("--precisions", PRECISIONS)
    add_choice("--normalizations", NORMALIZATIONS)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a CSV file, in which rows that are not measured again stay; "
        "default: benchmarks/results/tpu_compile-, the versions, and .csv",
    )
    arguments = parser.parse_args()
    arguments.normalizations = sorted(set(arguments.normalizations), key=NORMALIZATIONS.index)
    return arguments


def check_requirements():
    """Exits if the TPU compiler is not installed."""
    if not all(map(importlib.util.find_spec, ("jax", "libtpu"))):
        sys.exit('This benchmark needs JAX and the TPU compiler: pip install "keras_proxynorm[tpu]"')
    if keras.backend.backend() != "tensorflow":
        sys.exit("This benchmark compiles TensorFlow's train step: unset KERAS_BACKEND")


def main():
    """Measures, prints and writes, each row as soon as it is there."""
    arguments = parse_arguments()
    check_requirements()
    output = arguments.output or results_file()
    results = read_results(output)
    measured = []
    print(f"{'model':<12}{'precision':<16}{'normalization':<18}{'MB accessed':>18}{'MB temporary':>18}", end="")
    print(f"{'GFLOP':>10}{'seconds':>10}")
    for model in arguments.models:
        for precision in arguments.precisions:
            for normalization in arguments.normalizations:
                key = (model, precision, normalization)
                results[key] = measure(model, normalization, precision)
                measured.append(key)
                write_results(output, results)
                print_row(results, key)
    print(f"\nThe figure after each number of MB is its ratio to batch norm's. Written to {output}.")
    too_much = excesses({key: results[key] for key in results if key in measured or key[2] == "batch_norm"})
    if too_much:
        sys.exit("\n" + "\n".join(too_much))


if __name__ == "__main__":
    main()
