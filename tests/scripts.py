"""The scripts of the repository, which no package holds, as modules."""

import importlib.util
import pathlib

__all__ = ["ROOT", "load_script"]

ROOT = pathlib.Path(__file__).parents[1]


def load_script(path):
    """Runs a script by its path in the repository, and returns it as a module."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
