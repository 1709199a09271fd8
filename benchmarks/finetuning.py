"""Measures ways to fine-tune a network with batch norm at batch size 2: as it is, frozen, or with other normalizations.

    python3 -m pip install -e ".[examples]"
    python3 benchmarks/finetuning.py  # half an hour on two cores; stopped and called again, it goes on

A network is trained with batch norm on the first five classes of Fashion-MNIST, with a batch size of 64, once for each
seed. With a new last layer it is then fine-tuned on a few images of each of the other five classes, two at a time:

- "batch_norm" and "batch_norm frozen" keep the normalization; frozen it has the moving statistics in training, too;
- the others replace it, with the arguments of `keras_proxynorm.replace_normalization` behind their names; with
  "calibrate=True", the images that it is calibrated with are those to fine-tune on.

The learning rate is chosen for each on images that are held out. The column `old_accuracy` is that on test images of
the first five classes, of the network with its first last layer, when its normalization is replaced, before any step.
"""

import argparse
import functools
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import accuracy
from rate_search import add_arguments
from rate_search import check_positive
from rate_search import work

RESULTS = accuracy.ROOT / "benchmarks" / "results" / "finetuning.csv"
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
PRETRAINING = accuracy.Sizes(10000, 500, 5000, 5)
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


class Result(NamedTuple):
    """What a run found. Accuracies are fractions; the first is that on the old classes, before fine-tuning."""

    old_accuracy: float
    held_out_accuracy: float
    held_out_loss: float
    test_accuracy: float
    test_loss: float
    seconds: float
    versions: str


@functools.lru_cache(maxsize=4)
def load_task(new, sizes, seed, folder):
    """Images of the first five classes, or of the others with labels from 0: as `accuracy.load_data`.

    All are standardized as the images to pretrain on are, and the new ones are others for each seed.
    """
    import compare
    import numpy as np
    from sklearn.model_selection import train_test_split

    _, images, labels, test_images, test_labels = compare.load_fashion_mnist(folder, None, None)
    old = images[labels < CLASSES]
    mean, stddev = old.mean(), old.std()

    def of_task(images, labels):
        chosen = (labels >= CLASSES) == new
        return ((images[chosen] - mean) / stddev).astype("float32"), (labels[chosen] % CLASSES).astype("int32")

    images, labels = of_task(images, labels)
    train, held_out = train_test_split(
        np.arange(len(images)),
        train_size=sizes.train_images,
        test_size=sizes.held_out_images,
        stratify=labels,
        random_state=seed,
    )
    data = compare.Data("fashion_mnist", images[train], labels[train], *of_task(test_images, test_labels), CLASSES)
    return data, images[held_out], labels[held_out]


def pretrained(network, seed, cache, folder):
    """The network that is trained with batch norm on the first classes, from a file if there is one."""
    import compare
    import keras

    file = cache / f"{network}-{seed}-{'-'.join(map(str, PRETRAINING))}.keras"
    if not file.exists():
        data, *_ = load_task(False, PRETRAINING, 0, folder)
        keras.utils.set_random_seed(seed)
        model = accuracy.build_model(network, "batch_norm", data.train_images.shape[1:], CLASSES)
        order = compare.draw_order(len(data.train_images), PRETRAINING_BATCH_SIZE, PRETRAINING.epochs, seed)
        compare.compile_model(model, PRETRAINING_RATE, len(order))
        stop = keras.callbacks.TerminateOnNaN()
        model.fit(compare.make_batches(data, order), shuffle=False, verbose=0, callbacks=[stop])
        temporary = file.with_name(f"{os.getpid()}-{file.name}")
        model.save(temporary)
        temporary.replace(file)  # at once, because another process may look for it
    return keras.models.load_model(file, compile=False)


def with_normalization(model, text, images):
    """The pretrained model as it is to be fine-tuned, but for its last layer."""
    import keras

    from keras_proxynorm import replace_normalization

    if text == "batch_norm":
        return model
    if text == "batch_norm frozen":
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
        return model
    name, arguments = accuracy.parse_normalization(text)
    if arguments.get("calibrate"):
        arguments["calibrate"] = images
    return replace_normalization(model, name, **{**accuracy.GROUPS, **arguments})


@functools.lru_cache(maxsize=1)
def compiled_model(configuration, seed, cache, folder):
    """The model to fine-tune, the variable that its learning rates are multiplied with, and what it is before that."""
    import compare
    import keras

    keras.utils.clear_session()
    data, *_ = load_task(True, accuracy.Sizes(*configuration[3:5], 0, 0), seed, folder)
    model = pretrained(configuration.network, seed, cache, folder)
    model = with_normalization(model, configuration.normalization, data.train_images)
    old_data, *_ = load_task(False, PRETRAINING, 0, folder)
    compare.compile_model(model, 1.0, 1)
    _, old_accuracy = model.evaluate(old_data.test_images, old_data.test_labels, batch_size=500, verbose=0)
    keras.utils.set_random_seed(seed)
    logits = keras.layers.Dense(CLASSES, name="new_logits")(model.layers[-1].input)
    model = keras.Model(model.input, logits)
    steps = configuration.epochs * (configuration.train_images // configuration.batch_size)
    compare.compile_model(model, 1.0, steps)
    model.optimizer._learning_rate, scale = accuracy.scaled_schedule(model.optimizer._learning_rate)
    return model, scale, old_accuracy, model.get_weights()


def measure(cache, folder, run):
    """Fine-tunes and tests."""
    import compare

    start = time.perf_counter()
    configuration = run.configuration
    model, scale, old_accuracy, weights = compiled_model(configuration, run.seed, cache, folder)
    model.set_weights(weights)
    task = load_task(True, accuracy.Sizes(*configuration[3:5], 0, 0), run.seed, folder)
    (held_out_loss, held_out_accuracy), (loss, test) = accuracy.train_and_test(model, scale, run, *task)
    seconds = round(time.perf_counter() - start, 1)
    return Result(old_accuracy, held_out_accuracy, held_out_loss, test, loss, seconds, compare.describe_versions())


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, values in (("networks", NETWORKS), ("normalizations", NORMALIZATIONS)):
        text = " ".join(map(repr, values))
        parser.add_argument(f"--{name}", nargs="+", default=values, metavar="NAME", help=f"default: {text}")
    for name, default in (("train-images", 500), ("held-out-images", 1000), ("epochs", 4), ("batch-size", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with the four IDX files")
    parser.add_argument("--pretrained", type=Path, metavar="FOLDER", help="for files; default: a temporary one")
    add_arguments(parser, RESULTS)
    arguments = parser.parse_args()
    check_positive(parser, arguments, "train_images", "held_out_images", "epochs", "batch_size", "jobs", "minutes")
    arguments.fashion_mnist = accuracy.checked_fashion_mnist(parser, arguments.fashion_mnist)
    return arguments


def main():
    """Runs what the file has not."""
    arguments = parse_arguments()
    configurations = [
        Configuration(
            network,
            normalization,
            arguments.batch_size,
            arguments.train_images,
            arguments.held_out_images,
            arguments.epochs,
        )
        for network in arguments.networks
        for normalization in arguments.normalizations
    ]
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.pretrained or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        work(configurations, functools.partial(measure, cache, arguments.fashion_mnist), arguments, Result)


if __name__ == "__main__":
    main()
