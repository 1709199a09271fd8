"""What importing the package and its export loads, and what it offers."""

import subprocess
import sys

import pytest

import keras_proxynorm.export
from keras_proxynorm.export import export_onnx, export_saved_model


def test_names():
    assert keras_proxynorm.export.__all__ == sorted(keras_proxynorm.export.__all__)
    assert all(callable(getattr(keras_proxynorm.export, name)) for name in keras_proxynorm.export.__all__)


def test_converters_load_when_they_are_used():
    script = (
        "import sys, keras_proxynorm\n"
        "assert 'keras_proxynorm.export' not in sys.modules\n"
        "import keras_proxynorm.export\n"
        "print(sorted({'tf2onnx', 'onnx', 'onnxruntime'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("export", [export_onnx, export_saved_model])
@pytest.mark.parametrize("name", ["fold", "verify", "overwrite"])
def test_switches_are_booleans(export, name, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}='no'"):
        export(None, target, **{name: "no"})
    assert not target.exists()
