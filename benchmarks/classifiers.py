"""The images of the accuracy benchmarks, and how classifiers are trained on them.

All classifiers see the images in an order that depends on the seed alone, with a learning rate in proportion to the
batch size (Goyal et al., https://arxiv.org/abs/1706.02677), a warm-up and a cosine decay.
"""

import gzip
import importlib
import math
import os
from pathlib import Path
from typing import NamedTuple

# Read when TensorFlow is imported: print errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_proxynorm

__all__ = [
    "Data",
    "Images",
    "RateSchedule",
    "Sizes",
    "check_fashion_mnist",
    "compile_model",
    "describe_versions",
    "evaluate",
    "find_fashion_mnist",
    "load_digit_images",
    "load_fashion_mnist",
    "rate_for",
    "split",
    "standardize",
    "take",
    "train",
]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IDX_FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
# The batch size that learning rates are given for.
BASE_BATCH_SIZE = 64
WARM_UP = 0.05
# Steps in one call. With batches of two, a step takes a tenth less; more steps in a call gain nothing.
STEPS_PER_EXECUTION = 32
TEST_BATCH_SIZE = 250


class Sizes(NamedTuple):
    """Numbers of images, and of passes over the training images."""

    train_images: int
    held_out_images: int
    test_images: int
    epochs: int


class Images(NamedTuple):
    """Images of shape (samples, height, width, channels) with labels from 0."""

    images: np.ndarray
    labels: np.ndarray


class Data(NamedTuple):
    """Images to train with, to choose by and to test with."""

    train: Images
    held_out: Images
    test: Images
    classes: int


def find_idx(folder, name):
    """The file, compressed or not; None if there is none."""
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def find_fashion_mnist(folder=None):
    """The folder with the files of Fashion-MNIST: Debian's or Keras's if none is given; None if there is none."""
    keras_home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    candidates = [FASHION_MNIST, keras_home / "datasets" / "fashion-mnist"] if folder is None else [folder]
    return next((path for path in candidates if all(find_idx(path, name) for name in IDX_FILES)), None)


def check_fashion_mnist(parser, folder):
    """The folder with Fashion-MNIST; ends the program if there is none."""
    found = find_fashion_mnist(folder)
    if found is None:
        parser.error(
            f"{folder or 'No folder'} has the four files of Fashion-MNIST. Install Debian's package "
            "dataset-fashion-mnist, or give --fashion-mnist FOLDER"
        )
    return found


def read_idx(file):
    """The array in an IDX file of bytes: two zeros, the type, the number of dimensions, the dimensions, the values."""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        content = stream.read()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def load_fashion_mnist(folder):
    """The training and the test images, with pixels from 0 to 1."""
    arrays = [read_idx(find_idx(folder, name)) for name in IDX_FILES]
    return tuple(
        Images(images[..., np.newaxis] / 255, labels.astype("int32")) for images, labels in (arrays[:2], arrays[2:])
    )


def load_digit_images(test_images, size=16):
    """The same for the handwritten digits of scikit-learn, enlarged."""
    digits = load_digits()
    images, labels = np.asarray(tf.image.resize(digits.images[..., np.newaxis] / 16, (size, size))), digits.target
    images, others, labels, other_labels = train_test_split(
        images, labels.astype("int32"), stratify=labels, test_size=test_images, random_state=0
    )
    return Images(images, labels), Images(others, other_labels)


def take(data, chosen):
    """Some of the images with their labels."""
    return Images(data.images[chosen], data.labels[chosen])


def standardize(train, held_out, test, scale=None):
    """`Data` with a mean of 0 and a standard deviation of 1, or with the mean and standard deviation in `scale` so."""
    mean, stddev = scale or (train.images.mean(), train.images.std())
    parts = [Images(((part.images - mean) / stddev).astype("float32"), part.labels) for part in (train, held_out, test)]
    return Data(*parts, int(train.labels.max()) + 1)


def split(images, test, sizes, scale=None, seed=0):
    """Draws images to train with and to hold out, as many of each class as there are, and takes the first test images.

    Args:
        images: `Images` to draw from.
        test: `Images` to test with.
        sizes: `Sizes` of the parts.
        scale: As in `standardize`.
        seed: Of the draw.
    """
    train, held_out = train_test_split(
        np.arange(len(images.labels)),
        train_size=sizes.train_images,
        test_size=sizes.held_out_images,
        stratify=images.labels,
        random_state=seed,
    )
    test = take(test, slice(sizes.test_images))
    return standardize(take(images, train), take(images, held_out), test, scale)


def draw_order(images, batch_size, epochs, seed):
    """The images of each step. A last batch that is not full is dropped, so that all steps are alike."""
    random = np.random.default_rng(seed)
    steps = images // batch_size
    passes = [random.permutation(images)[: steps * batch_size].reshape(steps, batch_size) for _ in range(epochs)]
    return np.concatenate(passes)


def make_batches(data, order):
    """A `tf.data.Dataset` of the batches of images and labels."""
    with tf.device("cpu"):  # An accelerator gets the batches only.
        images, labels = map(tf.constant, data)
        batches = tf.data.Dataset.from_tensor_slices(order)
    return batches.map(lambda chosen: (tf.gather(images, chosen), tf.gather(labels, chosen))).prefetch(8)


def rate_for(batch_size, learning_rate):
    """The learning rate for a batch size, in proportion to that for `BASE_BATCH_SIZE`."""
    return learning_rate * batch_size / BASE_BATCH_SIZE


class RateSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A warm-up and a cosine decay. The peak is a variable, so that runs that differ in it share a graph."""

    def __init__(self, steps):
        self.steps = steps
        warm_up = math.ceil(WARM_UP * steps)
        self.peak = keras.Variable(1.0, trainable=False, name="peak")
        self.shape = keras.optimizers.schedules.CosineDecay(
            0.0, max(1, steps - warm_up), warmup_target=1.0, warmup_steps=warm_up
        )

    def __call__(self, step):
        return self.peak * self.shape(step)

    def get_config(self):
        return {"steps": self.steps}


def compile_model(model, steps, steps_per_execution=STEPS_PER_EXECUTION):
    """Compiles a classifier for so many steps of training; returns its `RateSchedule`."""
    schedule = RateSchedule(steps)
    model.compile(
        optimizer=keras.optimizers.SGD(schedule, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=min(steps_per_execution, steps),
        # XLA takes as long for a step on a CPU, and longer to compile. Other backends decide for themselves.
        jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
    )
    return schedule


def train(model, data, batch_size, epochs, seed, callbacks=()):
    """Trains a compiled model on `Images`, in the order of the seed."""
    order = draw_order(len(data.labels), batch_size, epochs, seed)
    # To Keras all passes are one epoch, because each epoch costs time of its own. The callback that stops what has
    # diverged also waits for each call; without that, some machines sleep for longer than the call takes.
    callbacks = [keras.callbacks.TerminateOnNaN(), *callbacks]
    model.fit(make_batches(data, order), shuffle=False, verbose=0, callbacks=callbacks)


def evaluate(model, data):
    """Loss and accuracy of a compiled model on `Images`."""
    return model.evaluate(*data, batch_size=TEST_BATCH_SIZE, verbose=0)


def describe_versions():
    """The versions of what computes, as in the files of results."""
    packages = dict.fromkeys(["tensorflow", keras.backend.backend(), "keras"])
    versions = [f"{name} {importlib.import_module(name).__version__}" for name in packages]
    return ", ".join([*versions, f"keras_proxynorm {keras_proxynorm.__version__}"])
