"""Measures ways to fine-tune a network with batch norm at batch size 2: as it is, frozen, or with other normalizations.

    python3 -m pip install -e ".[examples]"
    python3 benchmarks/finetuning.py  # half an hour on two cores; stopped and called again, it resumes

A network is trained with batch norm on the first five classes of Fashion-MNIST, with a batch size of 64, once for each
seed. With a new last layer it is then fine-tuned on a few images of each of the other five classes, two at a time:

- "batch_norm" and "batch_norm frozen" keep the normalization; frozen, it uses the moving statistics in training, too;
- the others replace it, with the arguments of `keras_proxynorm.replace_normalization` after the colon; with
  "calibrate=True", it is calibrated with the images to fine-tune on.

The learning rate is chosen for each on held-out images. The column `old_accuracy` is the accuracy on test images of the
first five classes, with the old last layer, after the normalization is replaced and before any training.
"""

import argparse
import functools
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import accuracy
import classifiers
import grids
import keras
import networks
from classifiers import Images, Sizes

from keras_proxynorm import replace_normalization

RESULTS = grids.RESULTS / "finetuning.csv"
NORMALIZATIONS = (
    "batch_norm",
    "batch_norm frozen",
    "group_norm",
    "group_norm:calibrate=True",
    "group_norm_proxy",
    "group_norm_proxy:compensate=True",
    "group_norm_proxy:calibrate=True",
    "layer_norm_proxy:calibrate=True",
)
NETWORKS = ("resnet20", "efficientnet")
PRETRAINING = Sizes(10000, 500, 5000, 5)
PRETRAINING_RATE = 0.1
PRETRAINING_BATCH_SIZE = 64
CLASSES = 5


class Configuration(NamedTuple):
    """What a learning rate is chosen for."""

    network: str
    normalization: str
    batch_size: int
    train_images: int
    held_out_images: int
    epochs: int

    @property
    def sizes(self):
        """The numbers of images and epochs; all test images of the new classes are used."""
        return Sizes(self.train_images, self.held_out_images, None, self.epochs)


class Result(NamedTuple):
    """What a run found. Accuracies are fractions; the first is that on the old classes, before fine-tuning."""

    old_accuracy: float
    held_out_accuracy: float
    held_out_loss: float
    test_accuracy: float
    test_loss: float
    seconds: float
    versions: str


def of_task(data, new):
    """The images of the first five classes, or of the others with labels from 0."""
    chosen = (data.labels >= CLASSES) == new
    return Images(data.images[chosen], data.labels[chosen] % CLASSES)


@functools.lru_cache(maxsize=4)
def load_old_task(folder):
    """`classifiers.Data` of the first five classes, and the mean and standard deviation of their pixels."""
    images, test = (of_task(data, new=False) for data in classifiers.load_fashion_mnist(folder))
    scale = images.images.mean(), images.images.std()
    return classifiers.split(images, test, PRETRAINING, scale), scale


@functools.lru_cache(maxsize=4)
def load_new_task(sizes, seed, folder):
    """`classifiers.Data` of the other classes, other images for each seed, scaled as the pretraining images are."""
    images, test = (of_task(data, new=True) for data in classifiers.load_fashion_mnist(folder))
    return classifiers.split(images, test, sizes, load_old_task(folder)[1], seed)


def pretrained(network, seed, cache, folder):
    """The network trained with batch norm on the first classes, from a file if there is one."""
    file = cache / f"{network}-{seed}-{'-'.join(map(str, PRETRAINING))}.keras"
    if not file.exists():
        data, _ = load_old_task(folder)
        keras.utils.set_random_seed(seed)
        model = networks.build_model(network, "batch_norm", {}, data.train.images.shape[1:], CLASSES)
        steps = PRETRAINING.epochs * (PRETRAINING.train_images // PRETRAINING_BATCH_SIZE)
        classifiers.compile_model(model, steps).peak.assign(PRETRAINING_RATE)
        classifiers.train(model, data.train, PRETRAINING_BATCH_SIZE, PRETRAINING.epochs, seed)
        temporary = file.with_name(f"{os.getpid()}-{file.name}")
        model.save(temporary)
        temporary.replace(file)  # in one step, because another process may look for it
    return keras.models.load_model(file, compile=False)


def accuracy_on_old_task(model, folder):
    """The test accuracy of a model on the first five classes."""
    classifiers.compile_model(model, 1)
    return classifiers.evaluate(model, load_old_task(folder)[0].test)[1]


def with_normalization(model, text, images):
    """The pretrained model with the normalization to fine-tune."""
    if text == "batch_norm":
        return model
    if text == "batch_norm frozen":
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
        return model
    name, arguments = networks.parse_normalization(text)
    if arguments.get("calibrate"):
        arguments["calibrate"] = images
    return replace_normalization(model, name, **{**networks.GROUPS, **arguments})


@functools.lru_cache(maxsize=1)
def compiled_model(configuration, seed, cache, folder):
    """The model to fine-tune, its `RateSchedule`, its initial weights, and its accuracy on the old classes."""
    keras.utils.clear_session()
    data = load_new_task(configuration.sizes, seed, folder)
    model = pretrained(configuration.network, seed, cache, folder)
    model = with_normalization(model, configuration.normalization, data.train.images)
    old_accuracy = accuracy_on_old_task(model, folder)
    keras.utils.set_random_seed(seed)
    logits = keras.layers.Dense(CLASSES, name="new_logits")(model.layers[-1].input)
    model = keras.Model(model.input, logits)
    steps = configuration.epochs * (configuration.train_images // configuration.batch_size)
    return model, classifiers.compile_model(model, steps), model.get_weights(), old_accuracy


def measure(cache, folder, run):
    """Fine-tunes and tests."""
    start = time.perf_counter()
    configuration = run.configuration
    model, schedule, weights, old_accuracy = compiled_model(configuration, run.seed, cache, folder)
    accuracy.start_anew(model, schedule, weights, configuration.batch_size, run.learning_rate)
    data = load_new_task(configuration.sizes, run.seed, folder)
    classifiers.train(model, data.train, configuration.batch_size, configuration.epochs, run.seed)
    held_out_loss, held_out_accuracy = classifiers.evaluate(model, data.held_out)
    loss, test_accuracy = classifiers.evaluate(model, data.test)
    seconds = round(time.perf_counter() - start, 1)
    versions = classifiers.describe_versions()
    return Result(old_accuracy, held_out_accuracy, held_out_loss, test_accuracy, loss, seconds, versions)


def add_arguments(parser):
    """Adds where images and pretrained networks are to a parser of the command line."""
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with the four IDX files")
    parser.add_argument("--pretrained", type=Path, metavar="FOLDER", help="for files; default: a temporary one")


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    grids.add_list(parser, "networks", NETWORKS)
    grids.add_list(parser, "normalizations", NORMALIZATIONS)
    for name, default in (("train-images", 500), ("held-out-images", 1000), ("epochs", 4), ("batch-size", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    add_arguments(parser)
    grids.add_arguments(parser, RESULTS)
    arguments = parser.parse_args()
    grids.check_positive(parser, arguments, "train_images", "held_out_images", "epochs", "batch_size")
    arguments.fashion_mnist = classifiers.check_fashion_mnist(parser, arguments.fashion_mnist)
    return arguments


def main():
    """Does the runs that the file does not have."""
    arguments = parse_arguments()
    sizes = arguments.batch_size, arguments.train_images, arguments.held_out_images, arguments.epochs
    configurations = [
        Configuration(network, normalization, *sizes)
        for network in arguments.networks
        for normalization in arguments.normalizations
    ]
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.pretrained or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        grids.work(configurations, functools.partial(measure, cache, arguments.fashion_mnist), arguments, Result)


if __name__ == "__main__":
    main()
