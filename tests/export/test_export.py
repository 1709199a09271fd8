"""What importing the package and its export loads, and what it offers."""

import subprocess
import sys

import keras_proxynorm.export


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
