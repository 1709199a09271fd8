"""Compares ways to fine-tune a pretrained batch-norm model at batch size 2: as it is, frozen, and with GN+PN instead.

    pip install "keras_proxynorm[examples]"
    python finetune.py
    python finetune.py --images FOLDER  # your own: one folder of images for each class

A small MobileNet learns half of the classes, at batch size 32, and is saved. Loaded again, it learns the other half
from a few images of each class, two images at a time:

- "BN": with batch norm, whose statistics come from two images.
- "BN frozen": the usual advice. Batch norm keeps the statistics, gamma and beta of the pretraining.
- "GN+PN": after `keras_proxynorm.replace_normalization`, without statistics of batches.

By default the data are the handwritten digits that come with scikit-learn (1797 images of 8x8 pixels, enlarged): 0 to
4, then 5 to 9. Nothing is downloaded. It takes two to three minutes on two cores.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# Read when TensorFlow is imported: print errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if not importlib.util.find_spec("sklearn"):
    sys.exit('This example needs scikit-learn: pip install "keras_proxynorm[examples]"')

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_proxynorm import replace_normalization

PRETRAINING_BATCH_SIZE = 32
# With fewer, the moving averages of batch norm, whose momentum is 0.99, are still near their initial values.
PRETRAINING_STEPS = 900
PRETRAINING_RATE = 3e-3
BATCH_SIZE = 2
# Of those tried, the best for "BN frozen" and for "GN+PN". "BN" fails with all of them.
LEARNING_RATE = 1e-3
LARGEST_DIFFERENCE = 1e-4
# The accuracy must be this many times the share of the most frequent class.
LOWEST_GAIN = 1.5


class Task(NamedTuple):
    """Some of the classes, with labels from 0."""

    classes: list[str]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Result(NamedTuple):
    """What was measured of one contender."""

    model: keras.Model
    old_accuracy: float
    accuracy_before: float
    accuracy: float
    startup: float
    step_ms: float


def load_digit_images(size):
    digits = load_digits()
    images = keras.ops.image.resize(digits.images[..., np.newaxis] / 16, (size, size))
    images = np.repeat(keras.ops.convert_to_numpy(images), 3, axis=-1)
    return (2 * images - 1).astype("float32"), digits.target, [str(digit) for digit in range(10)]


def load_folder(folder, size):
    dataset = keras.utils.image_dataset_from_directory(
        folder, image_size=(size, size), crop_to_aspect_ratio=True, batch_size=None, shuffle=False
    )
    images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.stack(images) / np.float32(127.5) - 1, np.array(labels), dataset.class_names


def make_task(images, labels, names, classes, seed, **split):
    """The images of `classes`, split into training and test images."""
    chosen = np.isin(labels, classes)
    new_labels = np.searchsorted(classes, labels[chosen])
    train_images, test_images, train_labels, test_labels = train_test_split(
        images[chosen], new_labels, stratify=new_labels, random_state=seed, **split
    )
    return Task([names[index] for index in classes], train_images, train_labels, test_images, test_labels)


def make_tasks(images, labels, names, images_per_class, seed):
    """The first half of the classes, for pretraining, and the second half, with few training images."""
    old, new = np.array_split(np.arange(len(names)), 2)
    few = images_per_class * len(new)
    return (
        make_task(images, labels, names, old, seed, test_size=0.2),
        make_task(images, labels, names, new, seed, train_size=few),
    )


def build_model(size, classes):
    backbone = keras.applications.MobileNet(
        input_shape=(size, size, 3), alpha=0.25, include_top=False, pooling="avg", weights=None
    )
    return keras.Model(backbone.input, layers.Dense(classes, name="logits")(backbone.output), name="pretrained")


def with_new_head(model, classes):
    """The model with another last layer, for other classes."""
    features = model.layers[-1].input
    return keras.Model(model.input, layers.Dense(classes, name="new_logits")(features), name="finetuned")


def compile_model(model, rate, steps):
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,  # XLA takes longer to compile than this takes to train.
    )


def pretrain(model, task):
    epochs = -(-PRETRAINING_STEPS * PRETRAINING_BATCH_SIZE // len(task.train_images))
    compile_model(model, PRETRAINING_RATE, PRETRAINING_STEPS)
    model.fit(task.train_images, task.train_labels, batch_size=PRETRAINING_BATCH_SIZE, epochs=epochs)


def finetune(model, task, epochs, seed):
    """Trains with two images at a time; returns the seconds it took to start and the milliseconds of a step."""
    dataset = tf.data.Dataset.from_tensor_slices((task.train_images, task.train_labels))
    # Shuffled here, not by `fit`, so that all contenders see the images in the same order.
    dataset = dataset.shuffle(len(task.train_images), seed=seed).batch(BATCH_SIZE)
    steps = len(dataset)
    compile_model(model, LEARNING_RATE, epochs * steps)
    times = [time.perf_counter()]
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: times.append(time.perf_counter()))
    model.fit(dataset, epochs=epochs, shuffle=False, callbacks=[clock])
    first, *others = np.diff(times)
    seconds = np.median(others)
    return first - seconds, 1000 * seconds / steps


def predict(model, images):
    # Not `model.predict`: to build a graph for each model takes longer.
    batches = np.array_split(images, -(-len(images) // 256))
    return np.concatenate([keras.ops.convert_to_numpy(model(batch, training=False)) for batch in batches])


def accuracy(model, images, labels):
    return np.mean(predict(model, images).argmax(axis=-1) == labels)


def keep_batch_norm(model):
    return model


def freeze_batch_norm(model):
    # With `trainable = False` these layers use their moving averages in training, too. To call a backbone with
    # `training=False` is not enough, because `fit` overrides it inside of a model.
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.trainable = False
    return model


def replace_batch_norm(model):
    # Compensated, because the weights were trained without proxy normalization.
    model, report = replace_normalization(model, compensate=True, return_report=True)
    print(report)
    return model


CONTENDERS = {"BN": keep_batch_norm, "BN frozen": freeze_batch_norm, "GN+PN": replace_batch_norm}


def run_contender(name, file, old_task, new_task, epochs, seed):
    print(f"\n{name}:")
    keras.utils.set_random_seed(seed)  # the same new head for all
    model = CONTENDERS[name](keras.models.load_model(file))
    old_accuracy = accuracy(model, old_task.test_images, old_task.test_labels)
    model = with_new_head(model, len(new_task.classes))
    before = accuracy(model, new_task.test_images, new_task.test_labels)
    startup, step_ms = finetune(model, new_task, epochs, seed)
    after = accuracy(model, new_task.test_images, new_task.test_labels)
    return Result(model, old_accuracy, before, after, startup, step_ms)


def print_table(results, old_task, new_task):
    print(
        f"\nPretrained on the classes {', '.join(old_task.classes)}, then fine-tuned on {', '.join(new_task.classes)} "
        f"with {len(new_task.train_images)} images.\nAccuracy on {len(old_task.test_images)} and "
        f"{len(new_task.test_images)} other images:\n"
    )
    print(f"{'':<12}{'':>10}{'old classes':>14}{'new classes':>22}{'':>12}{'':>10}")
    print(f"{'contender':<12}{'batch size':>10}{'before':>14}{'before':>12}{'after':>10}{'step':>12}{'start':>10}")
    for name, result in results.items():
        print(
            f"{name:<12}{BATCH_SIZE:>10}{result.old_accuracy:>14.3f}{result.accuracy_before:>12.3f}"
            f"{result.accuracy:>10.3f}{result.step_ms:>9.1f} ms{result.startup:>8.1f} s"
        )
    print(
        "\nBefore and after fine-tuning; before it, the last layer for the new classes is random. Step: in a typical "
        "epoch.\nStart: what the first epoch took longer than that, mostly for TensorFlow to build the graph."
    )


def reload_difference(model, file, images):
    """Saves and loads a model; returns the largest difference that this makes to its logits."""
    model.save(file)
    reloaded = keras.models.load_model(file)
    return np.abs(predict(reloaded, images) - predict(model, images)).max()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="default: the digits of scikit-learn")
    parser.add_argument("--size", type=int, default=40, help="of the images, in pixels; default: 40")
    parser.add_argument("--images-per-class", type=int, default=20, help="to fine-tune on; default: 20")
    parser.add_argument("--epochs", type=int, default=10, help="of the fine-tuning; default: 10")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: a new temporary directory")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches; default: 0")
    arguments = parser.parse_args()
    for name, lowest in (("size", 32), ("images_per_class", 1), ("epochs", 2)):
        if getattr(arguments, name) < lowest:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least {lowest}, not {getattr(arguments, name)}")
    if arguments.images is not None and not arguments.images.is_dir():
        parser.error(f"--images must be a folder with one folder of images for each class, not {arguments.images}")
    if arguments.output is None:
        arguments.output = Path(tempfile.mkdtemp(prefix="keras_proxynorm-"))
    elif arguments.output.exists() and (not arguments.output.is_dir() or any(arguments.output.iterdir())):
        parser.error(f"--output must be a new or an empty directory, and {arguments.output} is not")
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def load_tasks(arguments):
    if arguments.images is None:
        data = load_digit_images(arguments.size)
    else:
        data = load_folder(arguments.images, arguments.size)
    _, labels, names = data
    fewest = np.bincount(labels, minlength=len(names)).min()
    if len(names) < 4 or fewest < max(5, arguments.images_per_class + 2):
        sys.exit(
            f"There are {len(names)} classes, the smallest with {fewest} images. It takes 4 classes or more, each with "
            f"at least 5 images, and more than the {arguments.images_per_class} to fine-tune on (--images-per-class)."
        )
    return make_tasks(*data, arguments.images_per_class, arguments.seed)


def main():
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    old_task, new_task = load_tasks(arguments)

    print(f"Pretraining on {len(old_task.train_images)} images of the classes {', '.join(old_task.classes)}:")
    pretrained = build_model(arguments.size, len(old_task.classes))
    pretrain(pretrained, old_task)
    pretrained_file = arguments.output / "pretrained.keras"
    pretrained.save(pretrained_file)

    results = {
        name: run_contender(name, pretrained_file, old_task, new_task, arguments.epochs, arguments.seed)
        for name in CONTENDERS
    }
    print_table(results, old_task, new_task)

    finetuned_file = arguments.output / "finetuned.keras"
    difference = reload_difference(results["GN+PN"].model, finetuned_file, new_task.test_images)
    print(f"\nFiles in {arguments.output}. Saved and loaded, the logits of GN+PN differ by at most {difference:.1e}.")

    chance = np.bincount(new_task.test_labels).max() / len(new_task.test_labels)
    if results["GN+PN"].accuracy < LOWEST_GAIN * chance:
        sys.exit(f"\nGN+PN is hardly better than always the same class, {chance:.3f}: train for more epochs.")
    # Not `>`: a NaN is a failure too.
    if not difference <= LARGEST_DIFFERENCE:
        sys.exit(f"\nThe difference is larger than {LARGEST_DIFFERENCE}: saving changed the model.")


if __name__ == "__main__":
    main()
