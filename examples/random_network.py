"""Shows what each normalization does to a deep random network: Figure 2, top, of the Proxy Normalization paper.

    pip install "keras_proxynorm[examples,plots]"
    python random_network.py
    python random_network.py --images FOLDER  # your own images, in folders or not
    python random_network.py --output docs/figures --overwrite  # the figure of the documentation

A network of 3x3 convolutions, each followed by a normalization and relu, with random kernels, gamma and beta, gets real
images. The power of the normalized pre-activations is split into four terms, layer by layer:

- P1: the squared channel means. Near 1, channels are nearly constant, which is channel-wise collapse.
- P2: how much the means differ between images.
- P3: the squared standard deviations within an image.
- P4: how much the standard deviations differ between images.

With layer norm P1 goes to 1, at least as fast as the bound for an infinitely wide network; with group norm it goes to
nearly 1. With proxy normalization after them it goes to 0, as with batch norm. With instance norm all images have the
same channel means and standard deviations, so P2 and P4 are 0. The default images are the handwritten digits that come
with scikit-learn. It takes a minute on two cores.
"""

import argparse
import csv
import importlib.util
import os
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
from keras import layers, ops
from sklearn.datasets import load_digits

from keras_proxynorm import GroupNormProxy, LayerNormProxy
from keras_proxynorm.diagnostics import power_decomposition

# The values of the paper.
GAMMA_STDDEV = BETA_STDDEV = 0.2
GROUPS = 8


class PeriodicPadding(layers.Layer):
    """Pads each border with the pixels of the opposite one, so that all pixels are alike."""

    def call(self, x):
        x = ops.concatenate([x[:, -1:], x, x[:, :1]], axis=1)
        return ops.concatenate([x[:, :, -1:], x, x[:, :, :1]], axis=2)


def with_relu(norm):
    return lambda **affine: [norm(**affine), layers.ReLU()]


NORMALIZATIONS = {
    "BN": with_relu(layers.BatchNormalization),
    "IN": with_relu(lambda **affine: layers.GroupNormalization(groups=-1, **affine)),
    "LN": with_relu(lambda **affine: layers.GroupNormalization(groups=1, **affine)),
    f"GN({GROUPS})": with_relu(lambda **affine: layers.GroupNormalization(groups=GROUPS, **affine)),
    "LN+WS": with_relu(lambda **affine: layers.GroupNormalization(groups=1, **affine)),
    "LN+PN": lambda **affine: [LayerNormProxy(**affine)],
    f"GN({GROUPS})+PN": lambda **affine: [GroupNormProxy(groups=GROUPS, **affine)],
}
WEIGHT_STANDARDIZED = {"LN+WS"}


def standardize(kernel):
    """Standardizes filters to mean 0 and variance 1 / fan-in."""
    mean, stddev = kernel.mean(axis=(0, 1, 2)), kernel.std(axis=(0, 1, 2))
    return (kernel - mean) / stddev / np.sqrt(np.prod(kernel.shape[:3]))


def constant(values):
    """An initializer that gives these values."""
    return lambda shape, dtype=None: ops.convert_to_tensor(values, dtype)


def build_network(norm, shape, depth, width, seed):
    """The random network, with the same weights for each normalization."""
    rng = np.random.default_rng(seed)
    network, channels = [keras.Input(shape)], shape[-1]
    for _ in range(depth):
        kernel = rng.normal(0, 1 / np.sqrt(9 * channels), (3, 3, channels, width))
        kernel = standardize(kernel) if norm in WEIGHT_STANDARDIZED else kernel
        gamma, beta = rng.normal(1, GAMMA_STDDEV, width), rng.normal(0, BETA_STDDEV, width)
        network += [PeriodicPadding(), layers.Conv2D(width, 3, use_bias=False, kernel_initializer=constant(kernel))]
        network += NORMALIZATIONS[norm](gamma_initializer=constant(gamma), beta_initializer=constant(beta))
        channels = width
    return keras.Sequential(network)


def lower_bound(depth):
    """The lower bound of P1 with layer norm, at each layer, in an infinitely wide network."""
    rho = (1 + GAMMA_STDDEV**2) / (1 + GAMMA_STDDEV**2 + BETA_STDDEV**2)
    return 1 - rho ** np.arange(depth)


def load_images(folder, size, count, seed):
    if folder is None:
        images = load_digits().images[..., np.newaxis] / 16
        if size != images.shape[1]:
            images = keras.ops.convert_to_numpy(keras.ops.image.resize(images, (size, size)))
    else:
        dataset = keras.utils.image_dataset_from_directory(
            folder, labels=None, image_size=(size, size), crop_to_aspect_ratio=True, batch_size=None, seed=seed
        )
        images = np.stack(list(dataset.take(count).as_numpy_iterator())) / 255
    images = np.random.default_rng(seed).permutation(images)[:count].astype("float32")
    return (images - images.mean()) / images.std()


def measure(images, depth, width, seed):
    results = {}
    for norm in NORMALIZATIONS:
        start = time.perf_counter()
        model = build_network(norm, images.shape[1:], depth, width, seed)
        # In training mode, so that batch norm uses the statistics of the batch, which has all images.
        results[norm] = power_decomposition(model, images, training=True, batch_size=len(images), verbose=0)
        shares = "/".join(f"{share:.2f}" for share in results[norm].fractions[-1])
        print(f"{norm:<10} P1/P2/P3/P4 at layer {depth}: {shares}   ({time.perf_counter() - start:.0f} s)", flush=True)
        keras.utils.clear_session()
    return results


def write_csv(file, results):
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["normalization", "layer", "P1", "P2", "P3", "P4", "mean_square"])
        for norm, result in results.items():
            for i, (fractions, powers) in enumerate(zip(result.fractions, result.powers, strict=True)):
                writer.writerow([norm, i + 1, *(f"{x:.6f}" for x in (*fractions, powers.sum()))])


def plot(file, results, depth):
    figure, axes = plt.subplots(2, 4, figsize=(10.4, 4.2), dpi=120, layout="constrained", sharex=True, sharey=True)
    for ax, (norm, result) in zip(axes.flat, results.items(), strict=False):
        result.plot(ax, norm, legend=False)
        if norm == "LN":
            (bound,) = ax.plot(
                np.arange(1, depth + 1), lower_bound(depth), color="white", linewidth=1.2, linestyle="--"
            )
        ax.label_outer()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    last = axes[-1, -1]
    last.set_axis_off()
    # The dashed line is white, so the legend needs a dark background.
    legend = last.legend(
        [*handles[::-1], bound], [*labels[::-1], "lower bound of P1 for LN"], loc="center", frameon=True
    )
    legend.get_frame().set(facecolor="0.85", edgecolor="none")
    for ax in axes[0, 3:]:
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.set_xlabel("normalization layer")
    figure.savefig(file)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="default: the digits of scikit-learn")
    parser.add_argument("--size", type=int, default=8, help="of the images, in pixels; default: 8")
    parser.add_argument("--count", type=int, default=96, help="of images; default: 96")
    parser.add_argument("--depth", type=int, default=48, help="layers of the networks; default: 48")
    parser.add_argument("--width", type=int, default=256, help="channels of each layer; default: 256")
    parser.add_argument("--seed", type=int, default=0, help="of the networks and the choice of images; default: 0")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: a new temporary directory")
    parser.add_argument("--overwrite", action="store_true", help="replace files in the output directory")
    arguments = parser.parse_args()
    for name, lowest in (("size", 3), ("count", 2), ("depth", 2), ("width", GROUPS)):
        if getattr(arguments, name) < lowest:
            parser.error(f"--{name} must be at least {lowest}, not {getattr(arguments, name)}")
    if arguments.width % GROUPS:
        parser.error(f"--width must be a multiple of {GROUPS}, the number of groups, not {arguments.width}")
    if arguments.images is not None and not arguments.images.is_dir():
        parser.error(f"--images must be a folder of images, not {arguments.images}")
    if arguments.output is None:
        arguments.output = Path(tempfile.mkdtemp(prefix="keras_proxynorm-"))
    arguments.csv, arguments.png = (arguments.output / f"random_network.{kind}" for kind in ("csv", "png"))
    for file in (arguments.csv, arguments.png):
        if file.exists() and not arguments.overwrite:
            parser.error(f"{file} exists; give --overwrite to replace it")
    return arguments


def main():
    arguments = parse_arguments()
    images = load_images(arguments.images, arguments.size, arguments.count, arguments.seed)
    print(
        f"{len(images)} images of {images.shape[1]}x{images.shape[2]}, {arguments.depth} layers of {arguments.width}:"
    )
    results = measure(images, arguments.depth, arguments.width, arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.csv, results)
    plot(arguments.png, results, arguments.depth)
    # In the first layer the bound is 0.
    distance = (results["LN"].fractions[:, 0] - lower_bound(arguments.depth))[1:].min()
    print(f"\nP1 of LN is {distance:.3f} above its lower bound, or more. Files: {arguments.csv}, {arguments.png}")


if __name__ == "__main__":
    main()
