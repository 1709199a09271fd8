"""Measures what accuracy networks reach with batch norm, with group and layer norm with and without PN, and with none.

    python3 -m pip install -e ".[examples]"
    python3 benchmarks/accuracy.py                    # all of it: some hours on two cores
    python3 benchmarks/accuracy.py --minutes 90       # a part of it; the next call resumes
    python3 benchmarks/accuracy.py --datasets digits  # half an hour, and needs no files
    python3 benchmarks/accuracy.py --networks plain15 --normalizations batch_norm "group_norm_proxy:proxy_epsilon=0.1"

Each network is trained with each normalization and batch size. The learning rate is chosen for each on held-out images;
then the network is trained from further seeds, which draw the weights and the order of the images.

Each run that is done is a line of the CSV file, at once, and is never done again. Runs with other numbers of images or
epochs may be in the same file. `accuracy_report.py` makes the tables and plots of docs/accuracy.md from it.

The normalizations are "batch_norm", "none" (with biases instead) and the targets of
`keras_proxynorm.replace_normalization`, with further arguments of that after a colon, as in the last line above. The
argument "calibrate_proxies=8" is for training: `keras_proxynorm.training.CalibrateProxies` every 8 steps, on 64 of the
training images.

Nothing is downloaded: Fashion-MNIST is read from --fashion-mnist FOLDER, from Debian's package dataset-fashion-mnist,
or from the folder that Keras downloads it to; the digits are part of scikit-learn.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import NamedTuple

import classifiers
import grids
import keras
import networks
from classifiers import Sizes

from keras_proxynorm.training import CalibrateProxies

RESULTS = grids.RESULTS / "accuracy.csv"
NETWORKS = ("plain15", "resnet20", "plain30", "efficientnet")
DEFAULT_NETWORKS = {"fashion_mnist": NETWORKS, "digits": NETWORKS[:1]}
NORMALIZATIONS = ("batch_norm", "group_norm_proxy", "layer_norm_proxy", "group_norm", "layer_norm", "none")
BATCH_SIZES = (64, 8, 2)
DATASETS = {"fashion_mnist": Sizes(5000, 2000, 4000, 3), "digits": Sizes(1200, 200, 397, 10)}
CALIBRATION_IMAGES = 64


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

    @property
    def sizes(self):
        """The numbers of images and epochs."""
        return Sizes(*self[-len(Sizes._fields) :])


def parse_normalization(text):
    """The name, the arguments of `replace_normalization`, and every how many steps proxies are calibrated, or None."""
    name, arguments = networks.parse_normalization(text)
    calibrated_every = arguments.pop("calibrate_proxies", None)
    return name, arguments, calibrated_every


def build_model(network, normalization, shape, classes):
    """A network with a normalization as on the command line."""
    return networks.build_model(network, *parse_normalization(normalization)[:2], shape, classes)


@functools.lru_cache(maxsize=2)
def load_data(dataset, sizes, folder):
    """`classifiers.Data` of a dataset."""
    if dataset == "fashion_mnist":
        return classifiers.split(*classifiers.load_fashion_mnist(folder), sizes)
    return classifiers.split(*classifiers.load_digit_images(sizes.test_images), sizes)


@functools.lru_cache(maxsize=1)
def compiled_model(configuration, shape, classes):
    """The model of a configuration, for all its runs, and its `RateSchedule`."""
    keras.utils.clear_session()
    model = build_model(configuration.network, configuration.normalization, shape, classes)
    steps = configuration.epochs * (configuration.train_images // configuration.batch_size)
    *_, calibrated_every = parse_normalization(configuration.normalization)
    # Callbacks are called once an execution.
    limit = {} if calibrated_every is None else {"steps_per_execution": calibrated_every}
    return model, classifiers.compile_model(model, steps, **limit)


def start_anew(model, schedule, weights, batch_size, rate):
    """Sets a model that was trained before to initial weights, its optimizer too, and its learning rate."""
    model.set_weights(weights)
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))
    schedule.peak.assign(classifiers.rate_for(batch_size, rate))


def trained_model(folder, run):
    """Trains and tests: the model, which the next run changes, and the result.

    The same run on the same machine gives exactly equal results.
    """
    start = time.perf_counter()
    configuration = run.configuration
    data = load_data(configuration.dataset, configuration.sizes, folder)
    shape = data.train.images.shape[1:]
    model, schedule = compiled_model(configuration, shape, data.classes)
    keras.utils.set_random_seed(run.seed)
    weights = build_model(configuration.network, configuration.normalization, shape, data.classes).get_weights()
    start_anew(model, schedule, weights, configuration.batch_size, run.learning_rate)
    callbacks = []
    *_, calibrated_every = parse_normalization(configuration.normalization)
    if calibrated_every is not None:
        callbacks.append(CalibrateProxies(data.train.images[:CALIBRATION_IMAGES], every=calibrated_every))
    classifiers.train(model, data.train, configuration.batch_size, configuration.epochs, run.seed, callbacks)
    held_out_loss, held_out_accuracy = classifiers.evaluate(model, data.held_out)
    loss, accuracy = classifiers.evaluate(model, data.test)
    seconds = round(time.perf_counter() - start, 1)
    versions = classifiers.describe_versions()
    return model, grids.Result(held_out_accuracy, held_out_loss, accuracy, loss, seconds, versions)


def measure(folder, run):
    """The result of a run."""
    return trained_model(folder, run)[1]


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = " ".join(DATASETS)
    parser.add_argument(
        "--datasets", nargs="+", choices=DATASETS, default=list(DATASETS), metavar="NAME", help=f"default: {names}"
    )
    names = "; ".join(f"{' '.join(names)} with {dataset}" for dataset, names in DEFAULT_NETWORKS.items())
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, metavar="NAME", help=f"default: {names}")
    grids.add_list(parser, "normalizations", NORMALIZATIONS)
    grids.add_list(parser, "batch-sizes", BATCH_SIZES, int)
    for name in ("train_images", "held_out_images", "epochs"):
        numbers = ", ".join(f"{getattr(sizes, name)} with {dataset}" for dataset, sizes in DATASETS.items())
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"default: {numbers}")
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with the four IDX files")
    grids.add_arguments(parser, RESULTS)
    arguments = parser.parse_args()
    grids.check_positive(parser, arguments, "batch_sizes", "train_images", "held_out_images", "epochs")
    check_normalizations(parser, arguments)
    if "fashion_mnist" in arguments.datasets:
        arguments.fashion_mnist = classifiers.check_fashion_mnist(parser, arguments.fashion_mnist)
    return arguments


def check_normalizations(parser, arguments):
    """Ends the program if a name or argument is wrong, before hours pass until it is needed."""
    for text in arguments.normalizations:
        try:
            build_model("plain15", text, (16, 16, 1), 2)
        except (ValueError, SyntaxError) as error:
            parser.error(f"--normalizations {text}: {error}")


def make_configurations(arguments):
    """The configurations that are asked for, in the order in which they are trained."""
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
    """Does the runs that the file does not have."""
    arguments = parse_arguments()
    configurations = make_configurations(arguments)
    print(f"{len(configurations)} configurations, from {len(arguments.seeds)} seeds each, into {arguments.output}")
    grids.work(configurations, functools.partial(measure, arguments.fashion_mnist), arguments)


if __name__ == "__main__":
    main()
