"""What the benchmarks of accuracy train on, and how."""

import argparse

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from scripts import ROOT, load_script

pytestmark = tensorflow_only


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield load_script("benchmarks/classifiers.py")


def check_split(data, sizes):
    """Sizes, standardization, and that no image is in two parts."""
    assert tuple(len(part.images) for part in data[:3]) == tuple(len(part.labels) for part in data[:3]) == sizes[:3]
    assert data.classes == 10 and all(part.images.dtype == np.float32 for part in data[:3])
    assert abs(data.train.images.mean()) < 1e-4 and abs(data.train.images.std() - 1) < 1e-4
    rows = np.concatenate([part.images.reshape(len(part.images), -1) for part in data[:3]])
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert set(data.held_out.labels) == set(range(10))


def test_digits(script):
    sizes = script.Sizes(1200, 200, 397, 1)
    data = script.split(*script.load_digit_images(397), sizes)
    assert data.train.images.shape[1:] == (16, 16, 1)
    check_split(data, sizes)


def test_fashion_mnist(script, fashion_mnist):
    images, test = script.load_fashion_mnist(fashion_mnist)
    assert images.images.shape == (400, 28, 28, 1) and 0.9 < images.images.max() <= 1 and images.images.min() == 0
    assert np.array_equal(images.images[3].mean(axis=(1, 2)).argmax(), 6) and images.labels[3] == 3
    sizes = script.Sizes(200, 100, 50, 1)
    data = script.split(images, test, sizes)
    check_split(data, sizes)
    assert np.array_equal(data.test.labels, test.labels[:50])
    other = script.split(images, test, sizes, seed=1)
    assert not np.array_equal(other.train.images, data.train.images)
    scaled = script.split(images, test, sizes, scale=(0.5, 2.0))
    np.testing.assert_allclose(scaled.test.images, (test.images[:50] - 0.5) / 2, rtol=1e-6)


def test_folder_of_fashion_mnist(script, fashion_mnist, monkeypatch, capsys):
    monkeypatch.setattr(script, "FASHION_MNIST", fashion_mnist / "missing")
    monkeypatch.setenv("KERAS_HOME", str(fashion_mnist / "home"))
    assert script.find_fashion_mnist() is None
    (fashion_mnist / "home" / "datasets").mkdir(parents=True)
    (fashion_mnist / "home" / "datasets" / "fashion-mnist").symlink_to(fashion_mnist)
    assert script.find_fashion_mnist() == fashion_mnist / "home" / "datasets" / "fashion-mnist"
    assert script.find_fashion_mnist(fashion_mnist) == fashion_mnist
    (fashion_mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SystemExit):
        script.check_fashion_mnist(argparse.ArgumentParser(), fashion_mnist)
    assert f"{fashion_mnist} has the four files" in capsys.readouterr().err


@pytest.mark.parametrize("change", [lambda content: content[:-9], lambda content: content + b"more"])
def test_broken_idx_file(script, fashion_mnist, change):
    file = fashion_mnist / "t10k-labels-idx1-ubyte"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match="reshape"):
        script.load_fashion_mnist(fashion_mnist)


def test_order(script):
    order = script.draw_order(11, 2, 3, seed=0)
    assert order.shape == (15, 2)
    passes = order.reshape(3, 10)
    assert all(len(set(images)) == 10 and set(images) <= set(range(11)) for images in passes.tolist())
    assert not np.array_equal(passes[0], passes[1])
    assert np.array_equal(order, script.draw_order(11, 2, 3, seed=0))
    assert not np.array_equal(order, script.draw_order(11, 2, 3, seed=1))


def test_batches(script):
    data = script.Images(np.random.default_rng(0).standard_normal((16, 8, 8, 1)).astype("float32"), np.arange(16) % 3)
    order = script.draw_order(16, 4, 2, seed=0)
    batches = list(script.make_batches(data, order).as_numpy_iterator())
    assert len(batches) == 8
    for chosen, (images, labels) in zip(order, batches, strict=True):
        assert np.array_equal(images, data.images[chosen])
        assert np.array_equal(labels, data.labels[chosen])


def test_learning_rate(script):
    """It is proportional to the batch size, with a warm-up and a cosine decay."""
    assert {size: script.rate_for(size, 0.1) for size in (2, 64, 128)} == pytest.approx(
        {2: 0.1 / 32, 64: 0.1, 128: 0.2}
    )
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    script.compile_model(model, 200).peak.assign(0.2)
    rates = {}
    for step in (0, 5, 10, 105, 200):
        model.optimizer.iterations.assign(step)
        rates[step] = float(model.optimizer.learning_rate)
    assert rates == pytest.approx({0: 0, 5: 0.1, 10: 0.2, 105: 0.1, 200: 0}, abs=1e-6)
