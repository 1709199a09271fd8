"""Trains a small residual network with Proxy Normalization on handwritten digits, then saves, exports and serves it.

    pip install "keras_proxynorm[examples]"
    python quickstart.py

The data (1797 grey images of 8x8 pixels) comes with scikit-learn; nothing is downloaded. It takes about a minute.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Read when TensorFlow is imported: print errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if not all(map(importlib.util.find_spec, ("sklearn", "onnxruntime"))):
    sys.exit('This example needs scikit-learn and onnxruntime: pip install "keras_proxynorm[examples]"')

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_proxynorm import GroupNormProxy, LayerNormProxy, exclude_norm_from_weight_decay
from keras_proxynorm.export import export_onnx, export_saved_model

LOWEST_ACCURACY = 0.97
LARGEST_DIFFERENCE = 1e-4


def load_data(seed):
    digits = load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype("float32")
    return train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed)


def conv(x, filters, size=3, strides=1):
    # No bias: the normalization that follows would remove it.
    return layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)


def norm_relu(x):
    # Normalization, relu and proxy normalization: what BatchNormalization and ReLU would be elsewhere.
    return GroupNormProxy(groups=8)(x)


def norm(x):
    # The end of a branch has no activation, so it is normalized and scaled, and that is all.
    return GroupNormProxy(groups=8, activation=None, center=False)(x)


def residual_block(x, filters, strides=1):
    y = norm_relu(conv(x, filters, strides=strides))
    y = norm(conv(y, filters))
    if strides > 1:
        x = norm(conv(x, filters, size=1, strides=strides))
    return layers.Add()([x, y])


def build_model():
    image = keras.Input((8, 8, 1), name="image")
    x = norm_relu(conv(image, 32))
    x = residual_block(x, 32)
    x = residual_block(x, 64, strides=2)
    x = residual_block(x, 64)
    x = LayerNormProxy()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(10, name="logits")(x))


def train(model, images, labels, epochs):
    batch_size = 64
    steps = epochs * int(np.ceil(len(images) / batch_size))
    optimizer = keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(3e-3, steps), weight_decay=1e-2)
    model.compile(
        # Kernels and proxies decay, scales and offsets do not.
        optimizer=exclude_norm_from_weight_decay(optimizer, model),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(images, labels, batch_size=batch_size, epochs=epochs)


def run_model(model, images):
    """The logits of one image after the other, and the median time of a call in milliseconds."""
    for image in images[:20]:
        model(image[np.newaxis], training=False)
    logits, seconds = [], []
    for image in images:
        start = time.perf_counter()
        logits.append(model(image[np.newaxis], training=False).numpy())
        seconds.append(time.perf_counter() - start)
    return np.concatenate(logits), 1000 * np.median(seconds)


def run_exported(artefact, images):
    """The same for an exported file, in a process without Keras and without keras_proxynorm."""
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.npz"), Path(scratch, "outputs.npz")
        np.savez(inputs, image=images)
        script = Path(__file__).with_name("run_exported.py")
        child = subprocess.run([sys.executable, script, artefact, inputs, outputs], capture_output=True, text=True)
        if child.returncode:
            sys.exit(f"{script.name} failed on {artefact}:\n{child.stderr}")
        with np.load(outputs) as file:
            return file["logits"], float(file["latency_ms"])


def size_in_kb(path):
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()) / 1000


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: a new temporary directory")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches; default: 0")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs must be at least 1, not {arguments.epochs}")
    if arguments.output is None:
        arguments.output = Path(tempfile.mkdtemp(prefix="keras_proxynorm-"))
    elif arguments.output.exists() and (not arguments.output.is_dir() or any(arguments.output.iterdir())):
        parser.error(f"--output must be a new or an empty directory, and {arguments.output} is not")
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def main():
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    train_images, test_images, train_labels, test_labels = load_data(arguments.seed)

    model = build_model()
    train(model, train_images, train_labels, arguments.epochs)
    logits = model.predict(test_images, verbose=0)
    accuracy = np.mean(logits.argmax(axis=-1) == test_labels)

    keras_file = arguments.output / "digits.keras"
    model.save(keras_file)
    saved_model = export_saved_model(model, arguments.output / "saved_model")
    onnx_file = export_onnx(model, arguments.output / "digits.onnx")

    results = {
        "Keras": (keras_file, *run_model(keras.models.load_model(keras_file), test_images)),
        "TensorFlow": (saved_model, *run_exported(saved_model, test_images)),
        "ONNX Runtime": (onnx_file, *run_exported(onnx_file, test_images)),
    }
    print(f"\nTest accuracy {accuracy:.4f} on {len(test_images)} images. Files in {arguments.output}:\n")
    print(f"{'run by':<14}{'file':<16}{'size':>10}{'difference':>14}{'latency':>14}")
    differences = {}
    for runtime, (path, outputs, latency) in results.items():
        differences[runtime] = np.abs(outputs - logits).max()
        name = str(path.relative_to(arguments.output))
        print(f"{runtime:<14}{name:<16}{size_in_kb(path):>7.0f} kB{differences[runtime]:>14.1e}{latency:>11.2f} ms")
    print(
        "\nDifference: the largest, from the logits of the trained model in one batch. Latency: median of "
        f"{len(test_images)} calls with one image,\nwith the default threads of each on {os.cpu_count()} cores. "
        "The .keras file also has the state of the optimizer."
    )

    if accuracy < LOWEST_ACCURACY:
        sys.exit(f"\nThe test accuracy {accuracy:.4f} is below {LOWEST_ACCURACY}: train for 20 epochs or more.")
    # Not `>`: a NaN is a failure too.
    if not max(differences.values()) <= LARGEST_DIFFERENCE:
        sys.exit(f"\nA difference is larger than {LARGEST_DIFFERENCE}: saving or exporting changed the model.")


if __name__ == "__main__":
    main()
