"""Trains one network with all normalizations at several batch sizes: the accuracies of docs/baselines.md.

    python3 -m pip install -e ".[examples,plots]"
    python3 benchmarks/comparison.py  # one and a half hours on two cores; stopped and called again, it resumes

The network has nine 3x3 convolutions, each followed by a normalization and relu, and makes five passes over 6000 images
of Fashion-MNIST, with the same learning rate for all. From one seed, all normalizations start from the same kernels and
see the images in the same order. A normalization is "batch_norm", "none", or a target of
`keras_proxynorm.replace_normalization`, and "+sam_on" after it is sharpness-aware minimization of gamma and beta only.

`comparison_table.py` makes the table and the plot of docs/baselines.md from the file.
"""

import argparse
import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

import classifiers
import comparison_table
import grids
import keras
import networks

from keras_proxynorm import replace_normalization
from keras_proxynorm.training import SharpnessAwareMinimization

SAM_ON = "+sam_on"
NORMALIZATIONS = [name for _, name, _ in comparison_table.ROWS]
BATCH_SIZES = (64, 8, 2)
SIZES = classifiers.Sizes(6000, 0, 2000, 5)
DEPTH = 9
RATE = 0.1
RHO = 0.5


class Configuration(NamedTuple):
    """What is trained and tested."""

    normalization: str
    batch_size: int
    dataset: str
    image_size: int
    train_images: int
    test_images: int
    epochs: int
    depth: int
    rho: float | str
    arguments: str
    backend: str


class Result(NamedTuple):
    """What a run found. The accuracy is a fraction."""

    test_accuracy: float
    test_loss: float
    parameters: int
    seconds: float
    versions: str


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


def build_network(normalization, batch_size, steps, shape, classes):
    """The network with a normalization, made from the one with batch norm so that the kernels are the same."""
    name = normalization.removesuffix(SAM_ON)
    model = networks.plain(shape, classes, DEPTH)
    if name == "batch_norm":
        return model
    if name == "none":
        return replace_normalization(model, networks.identity)
    return replace_normalization(model, name, **arguments_for(name, batch_size, steps))


def for_training(model, normalization):
    """The model to compile and fit, which has the weights of `model`."""
    return SharpnessAwareMinimization(model, rho=RHO, adaptive="elementwise") if SAM_ON in normalization else model


def count_steps(batch_size):
    """The steps of a training."""
    return SIZES.epochs * (SIZES.train_images // batch_size)


def make_configuration(normalization, batch_size):
    """The configuration with all conditions, as in the file."""
    arguments = arguments_for(normalization.removesuffix(SAM_ON), batch_size, count_steps(batch_size))
    return Configuration(
        normalization,
        batch_size,
        "fashion_mnist",
        28,
        SIZES.train_images,
        SIZES.test_images,
        SIZES.epochs,
        DEPTH,
        RHO if SAM_ON in normalization else "",
        ", ".join(f"{name}={value}" for name, value in arguments.items()),
        keras.backend.backend(),
    )


@functools.lru_cache(maxsize=1)
def load_data(folder):
    """The first images of Fashion-MNIST, to train and to test with."""
    images, test = classifiers.load_fashion_mnist(folder)
    train, none = (classifiers.take(images, chosen) for chosen in (slice(SIZES.train_images), slice(0)))
    return classifiers.standardize(train, none, classifiers.take(test, slice(SIZES.test_images)))


def measure(folder, run):
    """Trains and tests."""
    start = time.perf_counter()
    keras.utils.clear_session()
    keras.utils.set_random_seed(run.seed)
    data = load_data(folder)
    normalization, batch_size = run.configuration[:2]
    steps = count_steps(batch_size)
    network = build_network(normalization, batch_size, steps, data.train.images.shape[1:], data.classes)
    model = for_training(network, normalization)
    classifiers.compile_model(model, steps).peak.assign(run.learning_rate)
    classifiers.train(model, data.train, batch_size, SIZES.epochs, run.seed)
    loss, accuracy = classifiers.evaluate(model, data.test)
    parameters = sum(math.prod(weight.shape) for weight in network.trainable_weights)
    seconds = round(time.perf_counter() - start, 1)
    return Result(accuracy, loss, parameters, seconds, classifiers.describe_versions())


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    grids.add_list(parser, "normalizations", NORMALIZATIONS, choices=NORMALIZATIONS)
    grids.add_list(parser, "batch-sizes", BATCH_SIZES, int)
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with the four IDX files")
    grids.add_arguments(parser, comparison_table.COMPARISON, seeds=(0,), rate=RATE)
    arguments = parser.parse_args()
    grids.check_positive(parser, arguments, "batch_sizes")
    arguments.fashion_mnist = classifiers.check_fashion_mnist(parser, arguments.fashion_mnist)
    return arguments


def main():
    """Does the runs that the file does not have."""
    arguments = parse_arguments()
    configurations = [
        make_configuration(normalization, batch_size)
        for batch_size in arguments.batch_sizes
        for normalization in arguments.normalizations
    ]
    grids.work(
        configurations,
        functools.partial(measure, arguments.fashion_mnist),
        arguments,
        Result,
        lambda configuration: classifiers.rate_for(configuration.batch_size, arguments.rate),
    )


if __name__ == "__main__":
    main()
