"""Compares normalizations at several batch sizes: one network, one dataset, the same passes over the same images.

    pip install "keras_proxynorm[examples,plots]"
    python compare.py
    python compare.py --fashion-mnist --output FOLDER  # of Debian's package dataset-fashion-mnist
    python compare.py --images FOLDER --image-size 64  # your own: one folder of images for each class
    python compare.py --normalizations batch_norm batch_norm+sam_on group_norm_proxy --batch-sizes 2 64 --seeds 0 1 2

A network of 3x3 convolutions, each with a normalization and relu behind it, is trained once for each normalization,
batch size and seed: a cell. All cells of a seed start from the same kernels and see the images in the same order. A
normalization is one of:

- "batch_norm", that of Keras, and "none";
- what `keras_proxynorm.replace_normalization` can put in its place, such as "group_norm" or "layer_norm_proxy";
- each of these followed by "+sam_on": with sharpness-aware minimization of the scales and offsets only.

The learning rate is proportional to the batch size (Goyal et al., https://arxiv.org/abs/1706.02677), with a warm-up
and a cosine decay.

Each cell that is done becomes a line of compare.csv, at once. Run again with the same --output, the script goes on
where it was, with other normalizations, batch sizes and seeds if you like, also in several processes at a time. The
table, compare.md, and the plot, compare.png, show all cells of the file.

The default images are the handwritten digits that come with scikit-learn, enlarged. Nothing is downloaded. The default
takes a few minutes on two cores, and a cell with Fashion-MNIST one to two minutes at batch size 2, half of it at 64;
cross-iteration and convolutional normalization take two to three times as long.
"""

import argparse
import csv
import gzip
import importlib.util
import io
import math
import os
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

# TensorFlow reads it when it is imported: errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_proxynorm
from keras_proxynorm import replace_normalization
from keras_proxynorm.surgery.targets import TARGETS

SAM_ON = "+sam_on"
NORMALIZATIONS = ["batch_norm", "none", *TARGETS]
DEFAULT_NORMALIZATIONS = ["batch_norm", "group_norm", "group_norm_proxy", "layer_norm", "layer_norm_proxy"]
WIDTHS = (16, 32, 64)
MOMENTUM = 0.9
# The batch size that --learning-rate is for.
BASE_BATCH_SIZE = 64
WARM_UP = 0.05
# With 32 steps in one call, a step with a batch of 2 takes a tenth less; more do not help further.
STEPS_PER_EXECUTION = 32
TEST_BATCH_SIZE = 250
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IDX_BYTES = 0x08
CELL = ["normalization", "batch_size", "seed"]
# What must be the same for cells to be comparable, or a cell to be the one that is asked for.
CONDITIONS = [
    *("dataset", "image_size", "train_images", "test_images", "epochs", "depth", "learning_rate", "rho", "arguments"),
    *("backend", "versions"),
]
RESULTS = ["test_accuracy", "test_loss", "parameters", "seconds"]


class Data(NamedTuple):
    """Images of mean 0 and standard deviation 1, with labels from 0."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int


class Cell(NamedTuple):
    """What is trained and tested once."""

    normalization: str
    batch_size: int
    seed: int


def arguments_for(name, batch_size, steps):
    """Arguments of `replace_normalization` that the paper of a normalization ties to the batch size or the steps."""
    if name == "cross_iteration_batch_norm":
        # Statistics of 16 images, from at most 8 steps; batch normalization in the first quarter of the training.
        window = min(math.ceil(16 / batch_size), 8)
        return {"window": window, "burn_in": steps // 4} if window > 1 else {"window": window}
    if name == "batch_group_norm":
        # The smaller the batch, the fewer groups; never more than channels here.
        sizes = {1: 1, 4: 2, 8: 16, 16: 64}
        return {"groups": sizes[max(size for size in sizes if size <= batch_size)], "min_channels_per_group": 1}
    if name == "ghost_batch_norm" and batch_size < 16:
        # Batch and group normalization in one, for batches that are too small for statistics of a channel.
        return {"examples_per_group": 2, "channel_groups": 8}
    return {}


def identity(name, dtype):
    return layers.Activation("linear", name=name, dtype=dtype)


def build_network(shape, classes, depth):
    """The network with batch normalization."""
    x = inputs = keras.Input(shape)
    for stage, width in enumerate(WIDTHS):
        for i in range(depth // len(WIDTHS)):
            # The initializer is for "none", which without it would fade out; a normalization undoes the difference.
            x = layers.Conv2D(
                width,
                3,
                strides=2 if stage and i == 0 else 1,
                padding="same",
                use_bias=False,
                kernel_initializer="he_normal",
            )(x)
            x = layers.BatchNormalization(momentum=MOMENTUM)(x)
            x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(layers.GlobalAveragePooling2D()(x)))


def with_normalization(model, name, batch_size, steps):
    """The network with another normalization; "+sam_on" is about training and makes no difference here."""
    name = name.removesuffix(SAM_ON)
    if name == "batch_norm":
        return model
    if name == "none":
        return replace_normalization(model, identity)
    # The weights are copied, not drawn again, so that all normalizations start from the same kernels.
    return replace_normalization(model, name, **arguments_for(name, batch_size, steps))


def for_training(model, name, rho):
    """What is to be compiled and fitted, which has the weights of the model."""
    if not name.endswith(SAM_ON):
        return model
    from keras_proxynorm.training import SharpnessAwareMinimization

    return SharpnessAwareMinimization(model, rho=rho, adaptive="elementwise")


def learning_rate_for(batch_size, learning_rate):
    return learning_rate * batch_size / BASE_BATCH_SIZE


def compile_model(model, rate, steps):
    warm_up = math.ceil(WARM_UP * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warm_up), warmup_target=rate, warmup_steps=warm_up
    )
    model.compile(
        optimizer=keras.optimizers.SGD(schedule, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=min(STEPS_PER_EXECUTION, steps),
        # XLA takes as long for a step on a CPU, and longer to compile. Other backends decide for themselves.
        jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
    )


def draw_order(images, batch_size, epochs, seed):
    """Which images are in which step. A last batch that is not full is left out, so that all steps are alike."""
    random = np.random.default_rng(seed)
    steps = images // batch_size
    passes = [random.permutation(images)[: steps * batch_size].reshape(steps, batch_size) for _ in range(epochs)]
    return np.concatenate(passes)


def make_batches(data, order):
    with tf.device("cpu"):  # An accelerator gets the batches only.
        images, labels = tf.constant(data.train_images), tf.constant(data.train_labels)
        batches = tf.data.Dataset.from_tensor_slices(order)
    return batches.map(lambda chosen: (tf.gather(images, chosen), tf.gather(labels, chosen))).prefetch(8)


def run_cell(cell, data, epochs, depth, learning_rate, rho):
    """Trains and tests; returns the results, by the names of their columns."""
    start = time.perf_counter()
    keras.utils.clear_session()
    keras.utils.set_random_seed(cell.seed)
    network = build_network(data.train_images.shape[1:], data.classes, depth)
    order = draw_order(len(data.train_images), cell.batch_size, epochs, cell.seed)
    network = with_normalization(network, cell.normalization, cell.batch_size, len(order))
    model = for_training(network, cell.normalization, rho)
    compile_model(model, learning_rate_for(cell.batch_size, learning_rate), len(order))
    # To Keras all passes are one epoch, because each epoch costs time of its own.
    model.fit(make_batches(data, order), shuffle=False, verbose=1 if sys.stdout.isatty() else 0)
    loss, accuracy = model.evaluate(data.test_images, data.test_labels, batch_size=TEST_BATCH_SIZE, verbose=0)
    return {
        "test_accuracy": f"{accuracy:.4f}",
        "test_loss": f"{loss:.4f}",
        "parameters": str(sum(math.prod(weight.shape) for weight in network.trainable_weights)),
        "seconds": f"{time.perf_counter() - start:.1f}",
    }


def split(images, labels, train_images, test_images):
    """The same in each run: a quarter to test with, and not more than asked for of either part."""
    from sklearn.model_selection import train_test_split

    test = min(test_images, len(images) // 4)
    train = min(train_images, len(images) - test)
    classes, sizes = np.unique(labels, return_counts=True)
    if len(classes) < 2 or sizes.min() < 2 or min(train, test) < len(classes):
        sys.exit(
            f"{train} images to train with and {test} to test with are too few for {len(classes)} classes, the "
            f"smallest of which has {sizes.min()}. It takes 2 classes or more, each with 2 images or more, and as many "
            "images of either kind as classes."
        )
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, stratify=labels, train_size=train, test_size=test, random_state=0
    )
    return train_images, train_labels, test_images, test_labels


def load_digit_images(train_images, test_images):
    from sklearn.datasets import load_digits

    digits = load_digits()
    return "digits", *split(digits.images[..., np.newaxis] / 16, digits.target, train_images, test_images)


def load_folder(folder, size, train_images, test_images):
    dataset = keras.utils.image_dataset_from_directory(
        folder, image_size=(size, size), crop_to_aspect_ratio=True, batch_size=None, seed=0
    )
    # Not all of them, which could be more than fit into memory.
    images, labels = zip(*dataset.take(train_images + test_images).as_numpy_iterator(), strict=True)
    images = np.stack(images) / np.float32(255)
    return str(folder.resolve()), *split(images, np.array(labels), train_images, test_images)


def find_idx(folder, name):
    """The file, compressed or not; None if there is none."""
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def read_idx(file):
    """The array in an IDX file of bytes: two zeros, the type, the number of dimensions, the dimensions, the values."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            content = stream.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        sys.exit(f"{file} is not a whole gzip file: {error}")
    dimensions = content[3] if len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * dimensions], ">i4")
    values = np.frombuffer(content, np.uint8)[4 + 4 * dimensions :]
    if content[:3] != bytes([0, 0, IDX_BYTES]) or len(shape) != dimensions or len(values) != math.prod(shape):
        sys.exit(f"{file} is not a whole IDX file of bytes.")
    return values.reshape(shape)


IDX_FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def load_fashion_mnist(folder, train_images, test_images):
    parts = [read_idx(find_idx(folder, name)) for name in IDX_FILES]
    for images, labels in (parts[:2], parts[2:]):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            sys.exit(f"{folder} has images of shape {images.shape} with labels of shape {labels.shape}.")
    limits = [train_images, train_images, test_images, test_images]
    images, labels, other_images, other_labels = (part[:limit] for part, limit in zip(parts, limits, strict=True))
    return "fashion_mnist", images[..., np.newaxis] / 255, labels, other_images[..., np.newaxis] / 255, other_labels


def resized(images, size):
    if images.shape[1:3] == (size, size):
        return images
    return np.asarray(tf.image.resize(images, (size, size)))


def load_data(arguments):
    limits = arguments.train_images, arguments.test_images
    if arguments.fashion_mnist is not None:
        name, *arrays = load_fashion_mnist(arguments.fashion_mnist, *limits)
    elif arguments.images is not None:
        name, *arrays = load_folder(arguments.images, arguments.image_size, *limits)
    else:
        name, *arrays = load_digit_images(*limits)
    train_images, train_labels, test_images, test_labels = arrays
    train_images, test_images = (resized(images, arguments.image_size) for images in (train_images, test_images))
    mean, stddev = train_images.mean(), train_images.std()
    return Data(
        name,
        ((train_images - mean) / stddev).astype("float32"),
        train_labels.astype("int32"),
        ((test_images - mean) / stddev).astype("float32"),
        test_labels.astype("int32"),
        int(max(train_labels.max(), test_labels.max())) + 1,
    )


def describe_versions():
    packages = dict.fromkeys(["tensorflow", keras.backend.backend(), "keras"])
    versions = [f"{name} {importlib.import_module(name).__version__}" for name in packages]
    return ", ".join([*versions, f"keras_proxynorm {keras_proxynorm.__version__}"])


def conditions_of(cell, data, arguments):
    """Under which conditions this run trains a cell, as in the file."""
    name, batch_size = cell.normalization, cell.batch_size
    steps = arguments.epochs * (len(data.train_images) // batch_size)
    own_arguments = arguments_for(name.removesuffix(SAM_ON), batch_size, steps)
    return {
        "dataset": data.name,
        "image_size": str(data.train_images.shape[1]),
        "train_images": str(len(data.train_images)),
        "test_images": str(len(data.test_images)),
        "epochs": str(arguments.epochs),
        "depth": str(arguments.depth),
        "learning_rate": f"{learning_rate_for(batch_size, arguments.learning_rate):g}",
        "rho": f"{arguments.rho:g}" if name.endswith(SAM_ON) else "",
        "arguments": ", ".join(f"{key}={value}" for key, value in own_arguments.items()),
        "backend": keras.backend.backend(),
        "versions": describe_versions(),
    }


def read_cells(file, data, arguments):
    """The rows of the file, by cell, all of which must have the conditions of this run."""
    if not file.exists():
        return {}
    with file.open(newline="") as stream:
        reader = csv.reader(stream)
        header = next(reader, None)
        lines = list(reader)
    if header != [*CELL, *CONDITIONS, *RESULTS]:
        sys.exit(f"{file} has other columns than this script writes. Give another --output.")
    rows = {}
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            sys.exit(f"Line {number} of {file} is not whole. Delete it to go on; its cell is then run again.")
        row = dict(zip(header, line, strict=True))
        cell = Cell(row["normalization"], int(row["batch_size"]), int(row["seed"]))
        for name, here in conditions_of(cell, data, arguments).items():
            if row[name] != here:
                sys.exit(
                    f"{file} has cells with other conditions: in line {number} {name} is {row[name]!r}, here it is "
                    f"{here!r}. Give another --output."
                )
        rows[cell] = row
    return rows


def append_line(file, values):
    """Appends by a single write, so that lines of several processes cannot get into each other."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.getvalue().encode())
    finally:
        os.close(descriptor)


def start_file(file):
    """Makes the file together with its header, unless there is one, maybe of another process at the same time."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    append_line(temporary, [*CELL, *CONDITIONS, *RESULTS])
    try:
        os.link(temporary, file)
    except OSError:  # There is one, or the file system has no links.
        if not file.exists():
            temporary.replace(file)
    temporary.unlink(missing_ok=True)


def remaining_seconds(cells, rows):
    """How long cells will take: as long as those with the same batch size, if there are any."""
    seconds = {}
    for cell, row in rows.items():
        seconds.setdefault(cell.batch_size, []).append(float(row["seconds"]))
    everything = [value for values in seconds.values() for value in values]
    return sum(statistics.fmean(seconds.get(cell.batch_size, everything)) for cell in cells)


def run_cells(cells, data, arguments):
    """Trains the cells that the file has not; returns all rows of the file."""
    start_file(arguments.csv)
    for i, cell in enumerate(cells):
        label = f"[{i + 1}/{len(cells)}] {cell.normalization}, batch size {cell.batch_size}, seed {cell.seed}"
        # Read again each time, because another process may have been faster.
        rows = read_cells(arguments.csv, data, arguments)
        if cell in rows:
            print(f"{label}: {float(rows[cell]['test_accuracy']):.3f}, from before", flush=True)
            continue
        if sys.stdout.isatty():
            print(label, flush=True)
        results = run_cell(cell, data, arguments.epochs, arguments.depth, arguments.learning_rate, arguments.rho)
        row = {**dict(zip(CELL, map(str, cell), strict=True)), **conditions_of(cell, data, arguments), **results}
        append_line(arguments.csv, [row[name] for name in (*CELL, *CONDITIONS, *RESULTS)])
        rows[cell] = row
        left = remaining_seconds([other for other in cells[i + 1 :] if other not in rows], rows)
        print(
            f"{label}: test accuracy {float(results['test_accuracy']):.3f} ({float(results['seconds']):.0f} s; about "
            f"{math.ceil(left / 60)} min to go)",
            flush=True,
        )
    return read_cells(arguments.csv, data, arguments)


def summarize(rows):
    """Mean and standard deviation of the accuracies over seeds, by normalization and batch size."""
    accuracies = {}
    for cell, row in rows.items():
        sizes = accuracies.setdefault(cell.normalization, {})
        sizes.setdefault(cell.batch_size, []).append(float(row["test_accuracy"]))
    return {
        name: {
            size: (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
            for size, values in sorted(sizes.items())
        }
        for name, sizes in accuracies.items()
    }


def make_table(rows):
    """The accuracies in percent as a table in Markdown."""
    summary = summarize(rows)
    parameters = {cell.normalization: row["parameters"] for cell, row in rows.items()}
    batch_sizes = sorted({cell.batch_size for cell in rows})
    seeds = len({cell.seed for cell in rows})
    table = [["normalization", *(f"batch size {size}" for size in batch_sizes), "parameters"]]
    for name, sizes in summary.items():
        texts = {size: f"{100 * mean:.1f}" for size, (mean, _) in sizes.items()}
        if seeds > 1:
            texts = {size: f"{texts[size]} ± {100 * stddev:.1f}" for size, (_, stddev) in sizes.items()}
        table.append([name, *(texts.get(size, "") for size in batch_sizes), parameters[name]])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    row = next(iter(rows.values()))
    deviation = f", mean and standard deviation over up to {seeds} seeds" if seeds > 1 else ""
    caption = (
        f"Test accuracy in percent{deviation}. {row['dataset']}, {row['train_images']} images, {row['epochs']} passes, "
        f"{row['depth']} convolutions; {row['versions']}, backend {row['backend']}."
    )
    return "\n".join([*lines, "", caption, ""])


def plot(file, rows):
    import matplotlib.pyplot as plt

    summary = summarize(rows)
    batch_sizes = sorted({cell.batch_size for cell in rows})
    figure, ax = plt.subplots(figsize=(8, 0.26 * max(15, len(summary))), dpi=120, layout="constrained")
    # In the legend as the lines are at their right ends.
    order = sorted(summary, key=lambda name: -max(summary[name].items())[1][0])
    for i, name in enumerate(order):
        sizes = summary[name]
        means, stddevs = (100 * np.array(values) for values in zip(*sizes.values(), strict=True))
        # Next to each other, so that error bars can be told apart.
        x = np.array(list(sizes)) * 2 ** (0.15 * ((i + 0.5) / len(order) - 0.5))
        (line,) = ax.plot(
            x,
            means,
            label=name,
            color=plt.get_cmap("tab10")(i % 10),
            # What has the same colour has another marker and another line.
            marker="osD^vP*"[i % 7],
            linestyle=["-", (0, (4, 1.5)), (0, (1, 1))][i // 10 % 3],
            linewidth=1.3,
            markersize=5,
        )
        if stddevs.any():
            ax.errorbar(x, means, stddevs, fmt="none", color=line.get_color(), capsize=2, linewidth=1)
    # What diverged is at chance, and would press all others together.
    values = {(name, size): 100 * mean for name in order for size, (mean, _) in summary[name].items()}
    shown = [value for value in values.values() if value >= max(values.values()) / 2]
    below = [f"{name} {value:.1f} at {size}" for (name, size), value in values.items() if value < min(shown)]
    if below:
        ax.set_ylim(bottom=min(shown) - 2)
        ax.set_title("Below the frame: " + ",\n".join(below), fontsize="small")
    ax.set_xscale("log", base=2)
    ax.set_xticks(batch_sizes, batch_sizes)
    ax.set_xlabel("batch size")
    ax.set_ylabel("test accuracy in %")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small", handlelength=3)
    figure.savefig(file)
    plt.close(figure)


def write_summary(arguments, rows):
    """The table, and the plot, in the place of those of an earlier run."""
    table = make_table(rows)
    arguments.markdown.write_text(table, encoding="utf-8")
    if not arguments.no_plot:
        plot(arguments.png, rows)
    print(f"\n{table}")
    written = [arguments.csv, arguments.markdown] + ([] if arguments.no_plot else [arguments.png])
    print(f"Files: {', '.join(map(str, written))}")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--normalizations",
        nargs="+",
        default=DEFAULT_NORMALIZATIONS,
        metavar="NAME",
        help=f"of {', '.join(NORMALIZATIONS)}, each alone or with {SAM_ON}; default: "
        f"{' '.join(DEFAULT_NORMALIZATIONS)}",
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 8, 64], metavar="N", help="default: 2 8 64")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="of weights and order; default: 0"
    )
    parser.add_argument("--epochs", type=int, default=5, help="passes over the images; default: 5")
    parser.add_argument("--depth", type=int, default=9, help="convolutions, in three stages; default: 9")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=0.1,
        help=f"for batch size {BASE_BATCH_SIZE}, for others in proportion; default: 0.1",
    )
    parser.add_argument("--rho", type=float, default=0.5, help=f"of {SAM_ON}; default: 0.5")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--fashion-mnist",
        type=Path,
        nargs="?",
        const=FASHION_MNIST,
        metavar="FOLDER",
        help=f"with its four IDX files; default: {FASHION_MNIST}",
    )
    source.add_argument("--images", type=Path, metavar="FOLDER", help="default: the digits of scikit-learn")
    parser.add_argument(
        "--image-size", type=int, help="in pixels; default: 28 for Fashion-MNIST, 32 for --images, 16 for the digits"
    )
    parser.add_argument("--train-images", type=int, default=6000, help="at most; default: 6000")
    parser.add_argument("--test-images", type=int, default=2000, help="at most; default: 2000")
    parser.add_argument("--output", type=Path, metavar="DIR", help="new, or of this script; default: a temporary one")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    parser.add_argument("--threads", type=int, help="of TensorFlow; for small batches 1 is as fast; default: all")
    return parser


def check_data(parser, arguments):
    if arguments.fashion_mnist is None and not importlib.util.find_spec("sklearn"):
        parser.error('without --fashion-mnist it takes scikit-learn: pip install "keras_proxynorm[examples]"')
    if arguments.images is not None and not arguments.images.is_dir():
        parser.error(f"--images must be a folder with one folder of images for each class, not {arguments.images}")
    if arguments.fashion_mnist is not None:
        missing = [name for name in IDX_FILES if find_idx(arguments.fashion_mnist, name) is None]
        if missing:
            parser.error(
                "--fashion-mnist must be a folder with the four IDX files, such as that of Debian's package "
                f"dataset-fashion-mnist; {arguments.fashion_mnist} has no {', no '.join(missing)}, with .gz or without"
            )
    if arguments.image_size is None:
        arguments.image_size = 28 if arguments.fashion_mnist is not None else 32 if arguments.images is not None else 16


def check_output(parser, arguments):
    if arguments.output is None:
        arguments.output = Path(tempfile.mkdtemp(prefix="keras_proxynorm-"))
    folder = arguments.output
    arguments.csv, arguments.markdown, arguments.png = (folder / f"compare.{kind}" for kind in ("csv", "md", "png"))
    if folder.exists() and not arguments.csv.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"--output must be a new or an empty directory, or one with compare.csv in it; {folder} is not")
    folder.mkdir(parents=True, exist_ok=True)


def parse_arguments():
    parser = make_parser()
    arguments = parser.parse_args()
    for name in arguments.normalizations:
        if name.removesuffix(SAM_ON) not in NORMALIZATIONS:
            parser.error(f"--normalizations must be of {', '.join(NORMALIZATIONS)}, with {SAM_ON} or not; not {name}")
        if name == "none" + SAM_ON:
            parser.error(f"--normalizations must have scales or offsets for {SAM_ON}; none has not")
    for name in ("batch_sizes", "epochs", "train_images", "test_images", "image_size", "threads"):
        values = getattr(arguments, name)
        if values is not None and min(np.atleast_1d(values)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {values}")
    if min(arguments.seeds) < 0:
        parser.error(f"--seeds must be at least 0, not {arguments.seeds}")
    for name in ("learning_rate", "rho"):
        if not 0 < getattr(arguments, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(arguments, name)}")
    if arguments.depth < 3 or arguments.depth % len(WIDTHS):
        parser.error(f"--depth must be a multiple of {len(WIDTHS)}, not {arguments.depth}")
    if not arguments.no_plot and not importlib.util.find_spec("matplotlib"):
        parser.error('the plot takes matplotlib: pip install "keras_proxynorm[plots]", or give --no-plot')
    check_data(parser, arguments)
    check_output(parser, arguments)
    return arguments


def main():
    arguments = parse_arguments()
    # It warns of graphs that are built again and again, which here is meant: each cell has its own.
    tf.get_logger().setLevel("ERROR")
    if arguments.threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
        tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    keras.utils.set_random_seed(0)  # of the choice of images
    data = load_data(arguments)
    if max(arguments.batch_sizes) > len(data.train_images):
        sys.exit(f"--batch-sizes must be at most {len(data.train_images)}, the number of images to train with.")
    cells = [
        Cell(normalization, batch_size, seed)
        for seed in dict.fromkeys(arguments.seeds)
        for batch_size in sorted(set(arguments.batch_sizes), reverse=True)
        for normalization in dict.fromkeys(arguments.normalizations)
    ]
    print(
        f"{data.name}: {len(data.train_images)} images to train with and {len(data.test_images)} to test with, "
        f"{data.classes} classes; {arguments.depth} convolutions; {len(cells)} cells. To go on later: "
        f"--output {arguments.output}",
        flush=True,
    )
    write_summary(arguments, run_cells(cells, data, arguments))


if __name__ == "__main__":
    main()
