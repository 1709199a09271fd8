"""Data in the format of Fashion-MNIST."""

import gzip

import numpy as np
import pytest


def write_idx(file, array):
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype("uint8").tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


@pytest.fixture
def fashion_mnist(tmp_path):
    """Files with the names and the format of Fashion-MNIST, whose images are bright where the class says."""
    random = np.random.default_rng(0)
    for name, count, suffix in (("train", 400, ".gz"), ("t10k", 100, "")):
        labels = np.arange(count) % 10
        images = random.integers(0, 100, (count, 28, 28))
        images[np.arange(count), 2 * labels] += 150
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{suffix}", labels)
    return tmp_path
