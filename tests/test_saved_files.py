"""Files of earlier versions load with `import keras_proxynorm` alone, and compute what they computed."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from backends import BACKEND

FOLDER = pathlib.Path(__file__).parent / "data" / "files_0.1.0"
NAMES = sorted(path.stem for path in FOLDER.glob("*.keras"))

# One process for all files, because the import takes longer than they do. What a file cannot do is its test's failure.
LOAD = """
import json, pathlib, sys, keras, numpy, keras_proxynorm
folder = pathlib.Path(sys.argv[1])
x = numpy.load(folder / "inputs.npz")["x"]
outputs = numpy.load(folder / "outputs.npz")
errors = {}
for path in sorted(folder.glob("*.keras")):
    try:
        y = keras.ops.convert_to_numpy(keras.models.load_model(path)(x, training=False))
        errors[path.stem] = float(numpy.abs(y - outputs[path.stem]).max())
    except Exception as error:
        errors[path.stem] = f"{type(error).__name__}: {error}"
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors():
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(FOLDER)],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": BACKEND},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_file_has_its_outputs():
    assert NAMES and sorted(np.load(FOLDER / "outputs.npz").files) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_file_computes_what_it_did(name, errors):
    assert isinstance(errors[name], float), errors[name]
    assert errors[name] <= 1e-5
