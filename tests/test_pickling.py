"""Pickles, copies, archives and shards of weights: every layer, built or not, here and in a fresh process."""

import copy
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import numpy, tensors
from baselines.samples import BASELINES, built, randomize

import keras_proxynorm as kp

SHAPE = (None, 4, 4, 8)
LAYERS = {
    "group_norm_proxy": lambda **kw: kp.GroupNormProxy(4, **kw),
    "layer_norm_proxy": lambda **kw: kp.LayerNormProxy(activation=keras.layers.LeakyReLU(0.1), **kw),
    "proxy_activation": lambda **kw: kp.ProxyActivation(activation="tanh", **kw),
    **BASELINES,
}
# joblib and cloudpickle copy these as pickle does.
COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy, "copy": copy.copy}


def model_of_all():
    layers = [randomize(built(make, SHAPE), seed) for seed, make in enumerate(LAYERS.values())]
    return keras.Sequential([keras.Input(SHAPE[1:]), *layers])


def assert_same(found, expected):
    for a, b in zip(found.variables, expected.variables, strict=True):
        assert a.name == b.name
        np.testing.assert_array_equal(numpy(a.value), numpy(b.value))


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, copied):
    for layer in (LAYERS[name](), randomize(built(LAYERS[name], SHAPE))):
        found = COPIES[copied](layer)
        configs = [{**each.get_config(), "layer": None} for each in (found, layer)]
        assert type(found) is type(layer) and configs[0] == configs[1]
        assert_same(found, layer)


# Keras copies models as it pickles them.
@pytest.mark.parametrize("copied", ["pickle", *(pytest.param(c, marks=pytest.mark.slow) for c in ("deepcopy", "copy"))])
def test_models(copied):
    model = model_of_all()
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).standard_normal((2, *SHAPE[1:])).astype("float32")
    model.train_on_batch(x, x)
    found = COPIES[copied](model)
    assert_same(found, model)
    np.testing.assert_array_equal(numpy(found(*tensors(x))), numpy(model(*tensors(x))))


def test_weights_in_shards(tmp_path):
    model, other = model_of_all(), model_of_all()
    for weight in other.weights:
        weight.assign(numpy(weight.value) + 1)
    model.save_weights(tmp_path / "model.weights.json", max_shard_size=1e-5)
    assert len(list(tmp_path.glob("*.h5"))) > 1
    other.load_weights(tmp_path / "model.weights.json")
    assert_same(other, model)


_UNPICKLE = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    layer, model = pickle.load(file), file.read()
assert "keras_proxynorm" in sys.modules and len(layer.weights) == 3
print(pickle.loads(model).count_params())
"""


def test_in_a_fresh_process(tmp_path):
    """A pickled layer imports the package; a pickled model says what to import."""
    model = model_of_all()
    (tmp_path / "layer_and_model").write_bytes(pickle.dumps(model.layers[0]) + pickle.dumps(model))
    (tmp_path / "model").write_bytes(pickle.dumps(model))

    def run(*arguments):
        return subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, env={**os.environ})

    found = run(_UNPICKLE, str(tmp_path / "layer_and_model"))
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) == model.count_params()
    found = run("import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))", str(tmp_path / "model"))
    assert found.returncode != 0 and "Could not locate class" in found.stderr
