"""The package as a whole: what it exports, what importing it costs, the examples in its docstrings."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import keras
import pytest

import keras_proxynorm
import keras_proxynorm.baselines
import keras_proxynorm.diagnostics
import keras_proxynorm.export
import keras_proxynorm.surgery
import keras_proxynorm.training

PACKAGES = (
    keras_proxynorm,
    keras_proxynorm.baselines,
    keras_proxynorm.diagnostics,
    keras_proxynorm.export,
    keras_proxynorm.surgery,
    keras_proxynorm.training,
)
MODULES = sorted(
    module.name
    for package in (keras_proxynorm, keras_proxynorm.export)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
)


def test_public_names():
    assert keras_proxynorm.__all__ == sorted(keras_proxynorm.__all__)
    for package in PACKAGES:
        for name in package.__all__:
            assert inspect.getdoc(getattr(package, name)), name


def public_callables():
    """The public functions, the constructors of the public classes, and the methods that these add to Keras's."""
    for package in PACKAGES:
        for name in package.__all__:
            value = getattr(package, name)
            if not inspect.isclass(value):
                yield f"{package.__name__}.{name}", value
                continue
            known = {method for base in value.__mro__ if base.__module__.startswith("keras.") for method in vars(base)}
            for method, function in vars(value).items():
                function = getattr(function, "__func__", function)
                is_own = (not method.startswith("_") and method not in known) or method == "__init__"
                if inspect.isfunction(function) and is_own and function.__module__.startswith("keras_proxynorm"):
                    yield f"{package.__name__}.{name}.{method}", function


CALLABLES = dict(public_callables())


@pytest.mark.parametrize("name", CALLABLES)
def test_public_functions_say_their_types(name):
    signature = inspect.signature(CALLABLES[name])
    parameters = [x for x in signature.parameters.values() if x.name not in ("self", "cls")]
    untyped = [x.name for x in parameters if x.annotation is x.empty and x.kind != x.VAR_KEYWORD]
    assert untyped == []
    assert name.endswith("__init__") or signature.return_annotation is not signature.empty


def test_layers_are_registered():
    packages = keras_proxynorm, keras_proxynorm.baselines, keras_proxynorm.training
    exported = {name: getattr(package, name) for package in packages for name in package.__all__}
    layers = {k: v for k, v in exported.items() if inspect.isclass(v) and issubclass(v, keras.layers.Layer)}
    assert len(layers) >= 15
    for name, layer in layers.items():
        assert keras.saving.get_registered_object(f"keras_proxynorm>{name}") is layer


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_they_are_for(name):
    module = importlib.import_module(name)
    assert module.__doc__ and isinstance(module.__all__, list)


@pytest.mark.parametrize("name", ["keras_proxynorm", "keras_proxynorm.export", *MODULES])
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"keras_proxynorm": keras_proxynorm}).failed == 0


def test_every_public_docstring_has_an_example():
    for package in PACKAGES:
        for name in package.__all__:
            assert ">>> " in inspect.getdoc(getattr(package, name)), name


def test_import_loads_nothing_heavy():
    code = (
        "import keras, sys\n"
        "before = set(sys.modules)\n"
        "import keras_proxynorm\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
        "import keras_proxynorm.export\n"
        "new = set(sys.modules) - before\n"
        "print(*(name for name in ('tf2onnx', 'onnx', 'onnxruntime', 'matplotlib') if name in new))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_the_package, by_the_export = done.stdout.splitlines()
    # Itself and the standard library, part of which Keras has loaded already.
    assert set(by_the_package.split()) <= {"keras_proxynorm"} | sys.stdlib_module_names
    assert by_the_export == ""
