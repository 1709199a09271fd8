"""Compares normalizations at several batch sizes: one network, the same images, the same number of passes.

    pip install "keras_proxynorm[examples,plots]"
    python compare.py
    python compare.py --normalizations batch_norm ghost_batch_norm evonorm_s0 --batch-sizes 2 64 --seeds 0 1 2
    python compare.py --images FOLDER --image-size 64  # your own: one folder of images for each class

A network of 3x3 convolutions, each followed by a normalization and relu, is trained once with each normalization, batch
size and seed. From one seed, all normalizations start from the same kernels and see the images in the same order. A
normalization is "batch_norm", or a target of `keras_proxynorm.replace_normalization`, such as "group_norm_proxy".

Each training that is done becomes a row of compare.csv. Called again with the same --output, the script does what is
missing. In the end it writes a table, compare.md, and a plot, compare.png.

The default images are the handwritten digits that come with scikit-learn; nothing is downloaded. It takes a few minutes
on two cores.
"""

import argparse
import csv
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

# Read when TensorFlow is imported: print errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if not all(map(importlib.util.find_spec, ("sklearn", "matplotlib"))):
    sys.exit('This example needs scikit-learn and matplotlib: pip install "keras_proxynorm[examples,plots]"')

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_proxynorm import replace_normalization

NORMALIZATIONS = ["batch_norm", "group_norm", "group_norm_proxy", "layer_norm", "layer_norm_proxy"]
BATCH_SIZES = [2, 8, 64]
WIDTHS = (16, 32, 64)
# The batch size that --learning-rate is for.
BASE_BATCH_SIZE = 64
# What a run is about, and what it found: the columns of compare.csv.
COLUMNS = ["normalization", "batch_size", "seed", "images", "image_size", "epochs", "depth", "learning_rate"]
COLUMNS += ["test_accuracy", "seconds"]


def load_images(folder, size):
    """Loads images of shape (samples, size, size, channels), and their labels."""
    if folder is None:
        digits = load_digits()
        images, labels = digits.images[..., np.newaxis], digits.target
        return keras.ops.convert_to_numpy(keras.ops.image.resize(images, (size, size))), labels
    dataset = keras.utils.image_dataset_from_directory(
        folder, image_size=(size, size), crop_to_aspect_ratio=True, batch_size=None, shuffle=False
    )
    images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.stack(images), np.array(labels)


def split(images, labels):
    """Three quarters to train with and the rest to test with, standardized."""
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, stratify=labels, test_size=0.25, random_state=0
    )
    mean, stddev = train_images.mean(), train_images.std()
    standardized = (((images - mean) / stddev).astype("float32") for images in (train_images, test_images))
    return list(zip(standardized, (train_labels, test_labels), strict=True))


def build_network(normalization, shape, classes, depth):
    """The network, in three stages, with a normalization."""
    x = inputs = keras.Input(shape)
    for stage, width in enumerate(WIDTHS):
        for i in range(depth // len(WIDTHS)):
            strides = 2 if stage and i == 0 else 1
            x = layers.Conv2D(width, 3, strides, padding="same", use_bias=False)(x)
            # Keras's momentum, 0.99, would be too slow for a few hundred steps.
            x = layers.BatchNormalization(momentum=0.9)(x)
            x = layers.ReLU()(x)
    outputs = layers.Dense(classes, name="logits")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    # Replaced and not built with another normalization, so that all have the same kernels.
    return model if normalization == "batch_norm" else replace_normalization(model, normalization)


def compile_model(model, learning_rate, steps):
    """Sets up SGD with a warm-up and a cosine decay."""
    warm_up = max(1, steps // 20)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warm_up), warmup_target=learning_rate, warmup_steps=warm_up
    )
    model.compile(
        optimizer=keras.optimizers.SGD(schedule, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=min(32, steps),  # because a step on a batch of 2 is short
        jit_compile=False,  # XLA takes longer to compile than this takes to train
    )


def train_and_test(run, train, test):
    """Trains and tests under the conditions of `run`; returns the results."""
    start = time.perf_counter()
    keras.utils.clear_session()
    keras.utils.set_random_seed(run["seed"])
    images, labels = train
    model = build_network(run["normalization"], images.shape[1:], int(labels.max()) + 1, run["depth"])
    # Only full batches, so that all steps are alike.
    batch_size = run["batch_size"]
    count = len(images) // batch_size * batch_size
    # Smaller batches take more steps, so the rate is proportional to the batch size.
    compile_model(model, run["learning_rate"] * batch_size / BASE_BATCH_SIZE, run["epochs"] * count // batch_size)
    random = np.random.default_rng(run["seed"])
    for _ in range(run["epochs"]):
        order = random.permutation(len(images))[:count]
        model.fit(images[order], labels[order], batch_size=batch_size, shuffle=False, verbose=0)
    _, accuracy = model.evaluate(*test, batch_size=250, verbose=0)
    return {"test_accuracy": round(accuracy, 4), "seconds": round(time.perf_counter() - start, 1)}


def read_rows(file):
    """The rows of earlier runs, as text."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != COLUMNS:
            sys.exit(f"{file} has other columns than this script writes. Give another --output.")
        return list(reader)


def append_row(file, row):
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if stream.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def do_missing(file, runs, train, test):
    """Does the runs that the file does not have; returns the rows of all of them."""
    found = []
    for i, run in enumerate(runs):
        conditions = {name: str(value) for name, value in run.items()}
        row = next((row for row in read_rows(file) if conditions.items() <= row.items()), None)
        if row is None:
            row = {**conditions, **train_and_test(run, train, test)}
            append_row(file, row)
        found.append(row)
        print(
            f"[{i + 1}/{len(runs)}] {row['normalization']}, batch size {row['batch_size']}, seed {row['seed']}: "
            f"test accuracy {float(row['test_accuracy']):.3f}, {float(row['seconds']):.0f} s",
            flush=True,
        )
    return found


def summarize(rows):
    """Mean and standard deviation of the accuracies in percent over the seeds, by normalization and batch size."""
    accuracies, summary = {}, {}
    for row in rows:
        key = row["normalization"], int(row["batch_size"])
        accuracies.setdefault(key, []).append(100 * float(row["test_accuracy"]))
    for (name, size), values in accuracies.items():
        stddev = statistics.stdev(values) if len(values) > 1 else 0.0
        summary.setdefault(name, {})[size] = statistics.fmean(values), stddev
    return summary


def make_table(summary):
    """The accuracies in Markdown."""
    batch_sizes = list(next(iter(summary.values())))
    table = [["test accuracy in %", *(f"batch size {size}" for size in batch_sizes)], ["---"] * (len(batch_sizes) + 1)]
    for name, sizes in summary.items():
        # A single seed has no deviation.
        table.append([name, *(f"{mean:.1f}" + f" ± {stddev:.1f}" * (stddev > 0) for mean, stddev in sizes.values())])
    return "".join("| " + " | ".join(line) + " |\n" for line in table)


def plot(file, summary):
    figure, ax = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for name, sizes in summary.items():
        means, stddevs = zip(*sizes.values(), strict=True)
        ax.errorbar(list(sizes), means, stddevs, label=name, marker="o", capsize=2)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(sizes), list(sizes))
    ax.set_xlabel("batch size")
    ax.set_ylabel("test accuracy in %")
    figure.legend(loc="outside right upper")
    figure.savefig(file)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "default: %(default)s"
    parser.add_argument("--normalizations", nargs="+", default=NORMALIZATIONS, metavar="NAME", help=default)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES, metavar="N", help=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help=default)
    parser.add_argument("--epochs", type=int, default=5, help="default: 5")
    parser.add_argument("--depth", type=int, default=9, help="convolutions, in three stages; default: 9")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="for batch size 64; default: 0.1")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="default: the digits of scikit-learn")
    parser.add_argument("--image-size", type=int, default=16, help="in pixels; default: 16")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: a new temporary directory")
    arguments = parser.parse_args()
    for name in ("batch_sizes", "epochs", "learning_rate", "image_size"):
        if not np.min(getattr(arguments, name)) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(arguments, name)}")
    if arguments.depth < 3 or arguments.depth % len(WIDTHS):
        parser.error(f"--depth must be a multiple of {len(WIDTHS)}, not {arguments.depth}")
    if arguments.images is not None and not arguments.images.is_dir():
        parser.error(f"--images must be a folder with one folder of images for each class, not {arguments.images}")
    for name in arguments.normalizations:
        try:
            build_network(name, (16, 16, 1), 2, 3)
        except ValueError as error:
            parser.error(f"--normalizations must be batch_norm or targets of replace_normalization: {error}")
    return arguments


def main():
    arguments = parse_arguments()
    output = arguments.output or Path(tempfile.mkdtemp(prefix="keras_proxynorm-"))
    output.mkdir(parents=True, exist_ok=True)
    train, test = split(*load_images(arguments.images, arguments.image_size))
    if max(arguments.batch_sizes) > len(train[1]):
        sys.exit(f"--batch-sizes must be at most {len(train[1])}, the number of training images.")
    print(f"{len(train[1])} training and {len(test[1])} test images. To resume: --output {output}", flush=True)
    same = {name: getattr(arguments, name) for name in ("image_size", "epochs", "depth", "learning_rate")}
    same["images"] = arguments.images or "digits"
    runs = [
        {"normalization": normalization, "batch_size": batch_size, "seed": seed, **same}
        for seed in dict.fromkeys(arguments.seeds)
        for batch_size in sorted(set(arguments.batch_sizes))
        for normalization in dict.fromkeys(arguments.normalizations)
    ]
    summary = summarize(do_missing(output / "compare.csv", runs, train, test))
    table = make_table(summary)
    (output / "compare.md").write_text(table, encoding="utf-8")
    plot(output / "compare.png", summary)
    print(f"\n{table}\nFiles in {output}")


if __name__ == "__main__":
    main()
