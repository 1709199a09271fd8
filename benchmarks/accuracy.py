"""Measures what accuracy networks reach with batch norm, with group and layer norm with and without PN, and with none.

    python3 -m pip install -e ".[examples]"
    python3 benchmarks/accuracy.py                    # all of it: some hours on two cores
    python3 benchmarks/accuracy.py --minutes 90       # a part of it; the next call goes on
    python3 benchmarks/accuracy.py --datasets digits  # the part that takes half an hour, and no files
    python3 benchmarks/accuracy.py --networks plain15 --normalizations batch_norm "group_norm_proxy:proxy_epsilon=0.1"

Each network is trained with each normalization and batch size, with a learning rate that is chosen for these on a part
of the training data that is held out, and then from further seeds, of weights and of the order of the images.

Each run that is done is a line in the CSV file, at once, and is never done again; runs with other numbers of images or
passes may be in the same file. `accuracy_report.py` makes the tables and plots of docs/accuracy.md from it.

The normalizations are "batch_norm", "none" (with biases in its place) and what `keras_proxynorm.replace_normalization`
takes, with further arguments of that behind a colon if you like, as in the last line above; "calibrate_proxies=8" among
them trains with `keras_proxynorm.training.CalibrateProxies` every 8 steps, on 64 of the images to train with.

Nothing is downloaded: Fashion-MNIST is read from --fashion-mnist FOLDER, from Debian's package dataset-fashion-mnist,
or from where Keras keeps what it has downloaded; the digits are part of scikit-learn.
"""

import argparse
import ast
import functools
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rate_search import Result
from rate_search import add_arguments
from rate_search import check_positive
from rate_search import work

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # what examples/compare.py has: images and their order, the optimizer

RESULTS = ROOT / "benchmarks" / "results" / "accuracy.csv"
NETWORKS = ("plain15", "resnet20", "plain30", "efficientnet")
DEFAULT_NETWORKS = {"fashion_mnist": NETWORKS, "digits": NETWORKS[:1]}
NORMALIZATIONS = ("batch_norm", "group_norm_proxy", "layer_norm_proxy", "group_norm", "layer_norm", "none")
BATCH_SIZES = (64, 8, 2)
# A group of the first stage, of 16 channels, then has two.
GROUPS = {"groups": 8, "min_channels_per_group": 2}
TEST_BATCH_SIZE = 250
# The argument that is about training, and how many images proxies are calibrated with.
CALIBRATE, CALIBRATION_IMAGES = "calibrate_proxies", 64


class Sizes(NamedTuple):
    """Numbers of images, and of passes over those to train with."""

    train_images: int
    held_out_images: int
    test_images: int
    epochs: int


DATASETS = {"fashion_mnist": Sizes(5000, 2000, 4000, 3), "digits": Sizes(1200, 200, 397, 10)}


class Configuration(NamedTuple):
    """What a learning rate is chosen for."""

    dataset: str
    network: str
    normalization: str
    batch_size: int
    train_images: int
    held_out_images: int
    test_images: int
    epochs: int


def parse_normalization(text):
    """The name of a normalization and the further arguments behind its colon."""
    name, _, arguments = text.partition(":")
    call = ast.parse(f"f({arguments})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError(f"must be NAME or NAME:ARGUMENT=VALUE,..., not {text}")
    return name, {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def build_model(network, normalization, shape, classes):
    """A network with a normalization; with the same seed, the kernels are the same with each normalization."""
    from networks import NETWORKS as builders

    from keras_proxynorm import replace_normalization

    name, arguments = parse_normalization(normalization)
    model = builders[network](shape, classes, use_bias=name == "none")
    if name == "batch_norm":
        return model
    if name == "none":
        import compare

        return replace_normalization(model, compare.identity)
    arguments.pop(CALIBRATE, None)
    return replace_normalization(model, name, **{**GROUPS, **arguments})


def find_fashion_mnist(folder=None):
    """The folder with the files of Fashion-MNIST; None if there is none."""
    import compare

    keras_home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    candidates = [compare.FASHION_MNIST, keras_home / "datasets" / "fashion-mnist"] if folder is None else [folder]
    complete = (path for path in candidates if all(compare.find_idx(path, name) for name in compare.IDX_FILES))
    return next(complete, None)


@functools.lru_cache(maxsize=2)
def load_data(dataset, sizes, folder):
    """What to train and test with, as `compare.Data`, and the images and the labels that are held out."""
    import compare
    import numpy as np
    from sklearn.model_selection import train_test_split

    if dataset == "fashion_mnist":
        _, *arrays = compare.load_fashion_mnist(folder, None, sizes.test_images)
    else:
        _, *arrays = compare.load_digit_images(sizes.train_images + sizes.held_out_images, sizes.test_images)
        arrays[::2] = (compare.resized(images, 16) for images in arrays[::2])
    images, labels, test_images, test_labels = arrays
    train, held_out = train_test_split(
        np.arange(len(images)),
        train_size=sizes.train_images,
        test_size=sizes.held_out_images,
        stratify=labels,
        random_state=0,
    )
    mean, stddev = images[train].mean(), images[train].std()

    def standardized(images):
        return ((images - mean) / stddev).astype("float32")

    labels, test_labels = labels.astype("int32"), test_labels.astype("int32")
    data = compare.Data(
        dataset,
        standardized(images[train]),
        labels[train],
        standardized(test_images),
        test_labels,
        int(labels.max()) + 1,
    )
    return data, standardized(images[held_out]), labels[held_out]


def scaled_schedule(schedule):
    """A learning rate schedule times a variable, so that runs that differ in the rate can share a graph."""
    import keras

    scale = keras.Variable(1.0, trainable=False, name="scale")

    class Scaled(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return scale * schedule(step)

    return Scaled(), scale


@functools.lru_cache(maxsize=1)
def compiled_model(configuration, shape, classes):
    """The model of a configuration, and the variable that its learning rates are multiplied with."""
    import compare
    import keras

    keras.utils.clear_session()
    model = build_model(configuration.network, configuration.normalization, shape, classes)
    steps = configuration.epochs * (configuration.train_images // configuration.batch_size)
    compare.compile_model(model, 1.0, steps)
    model.optimizer._learning_rate, scale = scaled_schedule(model.optimizer._learning_rate)
    _, arguments = parse_normalization(configuration.normalization)
    # Callbacks are called once an execution.
    model.steps_per_execution = min(model.steps_per_execution, arguments.get(CALIBRATE, steps))
    return model, scale


def train_and_test(model, scale, run, data, held_out_images, held_out_labels, callbacks=()):
    """Trains from the weights that the model has; returns loss and accuracy on what is held out, and on test data."""
    import compare
    import keras

    configuration = run.configuration
    scale.assign(compare.learning_rate_for(configuration.batch_size, run.learning_rate))
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))
    order = compare.draw_order(len(data.train_images), configuration.batch_size, configuration.epochs, run.seed)
    # The callback also waits for each call, without which some machines sleep for longer than the call takes.
    callbacks = [keras.callbacks.TerminateOnNaN(), *callbacks]
    model.fit(compare.make_batches(data, order), shuffle=False, verbose=0, callbacks=callbacks)
    return [
        model.evaluate(images, labels, batch_size=TEST_BATCH_SIZE, verbose=0)
        for images, labels in ((held_out_images, held_out_labels), (data.test_images, data.test_labels))
    ]


def measure(folder, run):
    """Trains and tests. With the same run, the result is the same to the last bit on the same machine."""
    return trained_model(folder, run)[1]


def trained_model(folder, run):
    """The model after a run, until the next one, and the result."""
    import compare
    import keras

    configuration = run.configuration
    start = time.perf_counter()
    sizes = Sizes(*(getattr(configuration, name) for name in Sizes._fields))
    data, *held_out = load_data(configuration.dataset, sizes, folder)
    shape = data.train_images.shape[1:]
    model, scale = compiled_model(configuration, shape, data.classes)
    keras.utils.set_random_seed(run.seed)
    fresh = build_model(configuration.network, configuration.normalization, shape, data.classes)
    model.set_weights(fresh.get_weights())
    callbacks = []
    _, arguments = parse_normalization(configuration.normalization)
    if CALIBRATE in arguments:
        from keras_proxynorm.training import CalibrateProxies

        callbacks.append(CalibrateProxies(data.train_images[:CALIBRATION_IMAGES], every=arguments[CALIBRATE]))
    (held_out_loss, held_out_accuracy), (loss, accuracy) = train_and_test(model, scale, run, data, *held_out, callbacks)
    seconds = round(time.perf_counter() - start, 1)
    return model, Result(held_out_accuracy, held_out_loss, accuracy, loss, seconds, compare.describe_versions())


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = " ".join(DATASETS)
    parser.add_argument(
        "--datasets", nargs="+", choices=DATASETS, default=list(DATASETS), metavar="NAME", help=f"default: {names}"
    )
    names = "; ".join(f"{' '.join(networks)} with {dataset}" for dataset, networks in DEFAULT_NETWORKS.items())
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, metavar="NAME", help=f"default: {names}")
    names = " ".join(NORMALIZATIONS)
    parser.add_argument("--normalizations", nargs="+", default=NORMALIZATIONS, metavar="NAME", help=f"default: {names}")
    numbers = " ".join(map(str, BATCH_SIZES))
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=BATCH_SIZES, metavar="N", help=f"default: {numbers}"
    )
    for name in ("train_images", "held_out_images", "epochs"):
        numbers = ", ".join(f"{getattr(sizes, name)} with {dataset}" for dataset, sizes in DATASETS.items())
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"default: {numbers}")
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with the four IDX files")
    add_arguments(parser, RESULTS)
    arguments = parser.parse_args()
    check_positive(parser, arguments, "batch_sizes", "train_images", "held_out_images", "epochs", "jobs", "minutes")
    check_normalizations(parser, arguments)
    if "fashion_mnist" in arguments.datasets:
        arguments.fashion_mnist = checked_fashion_mnist(parser, arguments.fashion_mnist)
    return arguments


def checked_fashion_mnist(parser, given):
    """The folder with Fashion-MNIST; ends the program if there is none."""
    folder = find_fashion_mnist(given)
    if folder is None:
        parser.error(
            f"{given or 'No folder'} has the four files of Fashion-MNIST. Install Debian's package "
            "dataset-fashion-mnist, or give --fashion-mnist FOLDER"
        )
    return folder


def check_normalizations(parser, arguments):
    """Names and their arguments, before hours pass until they are needed."""
    for text in arguments.normalizations:
        try:
            build_model("plain15", text, (16, 16, 1), 2)
        except (ValueError, SyntaxError) as error:
            parser.error(f"--normalizations {text}: {error}")


def make_configurations(arguments):
    """What is to be done, in the order in which it is."""
    configurations = []
    for dataset in arguments.datasets:
        given = {name: getattr(arguments, name) for name in ("train_images", "held_out_images", "epochs")}
        sizes = DATASETS[dataset]._replace(**{name: value for name, value in given.items() if value is not None})
        configurations += [
            Configuration(dataset, network, normalization, batch_size, *sizes)
            for network in arguments.networks or DEFAULT_NETWORKS[dataset]
            for batch_size in arguments.batch_sizes
            for normalization in arguments.normalizations
        ]
    return configurations


def main():
    """Runs what the file has not."""
    arguments = parse_arguments()
    configurations = make_configurations(arguments)
    print(f"{len(configurations)} configurations, from {len(arguments.seeds)} seeds each, into {arguments.output}")
    work(configurations, functools.partial(measure, arguments.fashion_mnist), arguments)


if __name__ == "__main__":
    main()
