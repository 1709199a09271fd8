"""The house: packages import in one direction, and what is private of other libraries is named in one place."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = [*sorted(ROOT.glob("keras_proxynorm/**/*.py")), *sorted(ROOT.glob("export/*.py"))]

# What a package may import, besides itself: all packages of the rows above its own.
ROWS = (
    {"arguments", "compat"},
    {"moments"},
    {"kernels", "graph"},
    {"layers"},
    {"baselines", "observation"},
    {"surgery", "folding", "training", "diagnostics"},
    {"export"},
)
LEVELS = {package: level for level, row in enumerate(ROWS) for package in row}
# Of named tuples and dataclasses.
PUBLIC_IN_SPITE_OF_THE_UNDERSCORE = {"_replace", "_fields", "_asdict", "_make"}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("keras_proxynorm", *parts) if parts[0] == "export" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path):
    """The modules of the package that a file imports, wherever in it."""
    modules = {module_of(file) for file in FILES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("keras_proxynorm"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras_proxynorm"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def package_of(module):
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_one_way(path):
    own = package_of(module_of(path))
    if own == "":
        return  # the top of the package shows what is in it
    for module in imported_modules(path):
        other = package_of(module)
        # The version, for what exports write down about themselves.
        assert other != "" or own == "export", f"{module_of(path)} imports the whole package"
        assert other in ("", own) or LEVELS[other] < LEVELS[own], f"{module_of(path)} must not import {module}"


def test_every_package_has_its_place():
    packages = {package_of(module_of(path)) for path in FILES} - {""}
    assert packages == set(LEVELS)


def test_a_graph_knows_no_normalization_of_the_package():
    for path in ROOT.glob("keras_proxynorm/graph/*.py"):
        assert not re.search(r"Proxy|baselines", re.sub(r'""".*?"""|"[^"\n]*"', "", path.read_text(), flags=re.DOTALL))


def own_private_names():
    """All names with an underscore that the package itself gives to something."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def test_what_is_private_of_others_is_named_in_compat_alone():
    own = own_private_names() | PUBLIC_IN_SPITE_OF_THE_UNDERSCORE
    modules = re.compile(r"keras\.src|tensorflow\.python|tensorflow\.compiler|tf2onnx\.(?!convert\b)\w+")
    found = []
    for path in FILES:
        if path.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            if name.startswith("_") and not name.startswith("__") and name not in own:
                found.append(f"{module_of(path)}:{node.lineno} {name}")
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
                value = getattr(node.args[1], "value", "")
                if re.match(r"_[^_]", str(value)) and value not in own:
                    found.append(f"{module_of(path)}:{node.lineno} {value}")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                found += [f"{module_of(path)}:{node.lineno} {name}" for name in names if modules.match(name)]
    assert found == []


def test_no_module_sets_anything_of_the_process():
    """But `set_reduction`, which is there for that, and the registry of activations, which users fill at import."""
    allowed = {"keras_proxynorm.kernels.reductions"}
    for path in FILES:
        if module_of(path) not in allowed:
            assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Global)], path
            assert "run_functions_eagerly" not in path.read_text(), path
