"""The command line: exports a .keras file, compares the artefacts with the model, and prints a table."""

import argparse
import contextlib
import importlib
import os
import re
import sys
import textwrap
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np

from keras_proxynorm.export.onnx import export_onnx
from keras_proxynorm.export.open_sizes import sizes_to_try, with_fixed_sizes
from keras_proxynorm.export.saved_model import export_saved_model
from keras_proxynorm.export.verification import (
    CannotLoadError,
    Verification,
    artefact_inputs,
    fitting_runtimes,
    run_in_fresh_process,
    verify,
)

__all__ = ["main"]

_PROGRAM = "keras-proxynorm-export"
_EXAMPLES = """\
examples:
  keras-proxynorm-export model.keras served/
      writes served/saved_model/1/ and served/model.onnx, for batch size 1
  keras-proxynorm-export model.keras model.onnx --batch-size dynamic
      writes one ONNX file, which takes any batch size
  keras-proxynorm-export model.keras served/ --format saved_model --input-shape 224,224,3 --threads 4
      fixes the sizes that the model leaves open, and measures the latency with four threads
  keras-proxynorm-export model.keras served/ --import my_layers
      imports my_layers.py first, which registers the custom classes of the model

Each artefact is run in a process of its own, without Keras and this package, and compared with the model; it takes its
name only if it passes. The exit status is 0 if all went well, 1 after a failure, 2 for a wrong command line.
"""


@dataclass
class _Exported:
    """An artefact with the results of its comparison and its latencies."""

    path: Path
    verification: Verification | None = None
    latencies: dict[str, float | None] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: List of strings, the arguments. Defaults to those of the process.

    Returns:
        The exit status: 0, or 1 after a failure, which is then described on stderr.
    """
    options = _parse(arguments)
    try:
        exported = _run(options)
    # Of any class: the code of a user's layers, and TensorFlow tracing it, can raise anything.
    except Exception as error:
        print(f"{_PROGRAM}: error: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr)
        return 1
    print(_table(exported, options))
    return 0


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Exports a Keras model as a TensorFlow SavedModel and an ONNX file, which need neither Keras nor\n"
        "keras_proxynorm to run, and reports their differences from the model and their latencies.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL.keras", type=Path, help="the file that model.save() wrote")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="a directory, for saved_model/<version>/ and model.onnx, or one .onnx file",
    )
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--format", choices=["saved_model", "onnx", "both"], help="default: both, or onnx if OUT ends in .onnx"
    )
    group.add_argument("--batch-size", metavar="N", type=_batch_size, default=1, help="or dynamic (default: 1)")
    group.add_argument(
        "--input-shape",
        metavar="[NAME=]SIZES",
        type=_input_shape,
        action="append",
        default=[],
        help="sizes that the model leaves open, without the batch: 224,224,3, or none,none,3 to leave them open in the "
        "artefact, too; once for each of several inputs, with their names: image=224,224,3",
    )
    group.add_argument("--opset", metavar="N", type=_positive, help="version of the ONNX operators")
    group.add_argument("--float16-weights", action="store_true", help="store the weights of the ONNX file in float16")
    group.add_argument("--no-fold", dest="fold", action="store_false", help="keep the graph as the layers compute it")
    group.add_argument("--version", metavar="N", type=_positive, help="of the SavedModel (default: the next one)")
    group.add_argument("--overwrite", action="store_true", help="replace what is there")
    group.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="Python module, from the current directory too, that defines custom classes of the model",
    )
    group = parser.add_argument_group("what is checked and measured")
    group.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare with the model")
    group.add_argument(
        "--tolerance",
        metavar="X",
        type=_positive_float,
        default=None,
        help="relative difference that is allowed (default: 1e-4; with --float16-weights 0.1)",
    )
    group.add_argument("--threads", metavar="N", type=_positive, default=1, help="for the latency (default: 1)")
    group.add_argument(
        "--runs", metavar="N", type=_count, default=50, help="calls to take the latency from (default: 50; 0 for none)"
    )
    options = parser.parse_args(arguments)
    if options.format is None:
        options.format = "onnx" if options.out.suffix == ".onnx" else "both"
    elif options.format != "onnx" and options.out.suffix == ".onnx":
        parser.error(f"argument --format: OUT is an .onnx file, so it must be onnx, not {options.format}")
    shapes = dict(options.input_shape)
    if len(shapes) < len(options.input_shape) or (None in shapes and len(shapes) > 1):
        parser.error("argument --input-shape: each of several inputs needs its name, once: NAME=224,224,3")
    options.input_shape = shapes.get(None, shapes or None)
    if options.tolerance is None:
        options.tolerance = 0.1 if options.float16_weights else 1e-4
    return options


def _run(options):
    targets = {}
    if options.format != "onnx":
        targets["SavedModel"] = options.out / "saved_model"
    if options.format != "saved_model":
        targets["ONNX"] = options.out if options.out.suffix == ".onnx" else options.out / "model.onnx"
    # Checked before any of the work, and all of them, so that both are written or none.
    for path in (targets.get("ONNX"), options.version and options.out / "saved_model" / str(options.version)):
        if path and path.exists() and not options.overwrite:
            raise FileExistsError(f"{path} exists already; pass --overwrite to replace it")

    steps = 1 + len(targets) + bool(options.runs)
    _say(1, steps, f"loading {options.model}")
    model = _load(options.model, options.modules)
    exported = []
    for step, (kind, target) in enumerate(targets.items(), start=2):
        _say(step, steps, f"exporting {kind}" + (" and comparing it with the model" if options.verify else ""))
        exported.append(_export(model, kind, target, options))
    if options.runs:
        _say(steps, steps, "measuring the latency")
        for artefact in exported:
            artefact.latencies = _latencies(artefact, options)
    return exported


def _say(step, steps, what):
    print(f"[{step}/{steps}] {what}", file=sys.stderr, flush=True)


def _load(path, modules):
    if modules:
        # The module path of a console script begins with the folder of the script instead.
        sys.path.insert(0, os.getcwd())
    for module in modules:
        importlib.import_module(module)
    if not path.exists():
        raise FileNotFoundError(f"MODEL.keras must be a file. Received: {path}, which does not exist")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"MODEL.keras must be a file as model.save('model.keras') writes it. Received: {path}")
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:
        unknown = re.search(r"Could not locate (?:class|function) '([^']+)'", str(error))
        if unknown:
            raise ValueError(
                f"MODEL.keras has an object of the custom class or function '{unknown[1]}'; name the module that "
                f"defines and registers it: --import MODULE. Received: {path}"
            ) from error
        raise ValueError(
            f"MODEL.keras cannot be loaded. Received: {path}. {textwrap.shorten(str(error), 500)}"
        ) from error


def _export(model, kind, target, options):
    batch_size = None if options.batch_size == "dynamic" else options.batch_size
    verifications: list[Verification] = []

    def check(*args, **kwargs):
        verifications.append(verify(*args, **kwargs, tolerance=options.tolerance))

    arguments = {
        "batch_size": batch_size,
        "input_shape": options.input_shape,
        "fold": options.fold,
        "verify": check if options.verify else False,
        "overwrite": options.overwrite,
    }
    if kind == "ONNX":
        path = export_onnx(model, target, opset=options.opset, float16_weights=options.float16_weights, **arguments)
    else:
        path = export_saved_model(model, target, version=options.version, **arguments)
    return _Exported(path, verifications[0] if verifications else None)


def _latencies(exported, options):
    """Median seconds of a call, for each runtime that is installed and can load the artefact."""
    path, verification = exported.path, exported.verification
    try:
        runtimes = fitting_runtimes(path)
    except ImportError:
        return {}
    # 0 and 1 are valid for images and for the ids of tokens.
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, (shape, _) in artefact_inputs(path).items()}
    # Those of the comparison, because the model may refuse others.
    compared = verification.comparisons[0].sizes if verification else None
    exported.sizes = compared or next(sizes_to_try(shapes.values()))
    inputs = {
        name: rng.integers(0, 2, with_fixed_sizes(shapes[name], 1, exported.sizes)).astype(dtype)
        for name, (_, dtype) in artefact_inputs(path).items()
    }
    latencies = {}
    for runtime in runtimes:
        # The comparison has warned of it.
        with contextlib.suppress(CannotLoadError):
            _, latencies[runtime] = run_in_fresh_process(
                path, runtime, [inputs], threads=options.threads, runs=options.runs
            )
    return latencies


def _table(exported, options):
    rows = [("artefact", "size", "runtime", "difference", "latency")]
    for artefact in exported:
        worst = artefact.verification.worst if artefact.verification else {}
        first = (str(artefact.path), f"{_size(artefact.path) / 1e6:.3g} MB")
        for runtime in worst or artefact.latencies or ["-"]:
            difference = f"{worst[runtime].relative:.1e}" if runtime in worst else "-"
            seconds = artefact.latencies.get(runtime)
            rows.append((*first, runtime, difference, "-" if seconds is None else f"{1000 * seconds:.3g} ms"))
            first = ("", "")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.append("")
    if options.verify:
        lines.append("difference: the largest from the Keras model, relative to its largest output")
    if options.runs:
        size = 1 if options.batch_size == "dynamic" else options.batch_size
        threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
        taken = {artefact.sizes for artefact in exported if artefact.sizes}
        sizes = "".join(f", open sizes {'x'.join(map(str, sizes))}" for sizes in taken)
        lines.append(
            f"latency: median of {options.runs} calls, batch size {size}{sizes}, {threads}, in a process of its own"
        )
    return "\n".join(lines).rstrip()


def _size(path):
    """Bytes of a SavedModel's directory, or of an ONNX file and the files that it refers to."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    import onnx

    weights = onnx.load(path, load_external_data=False).graph.initializer
    others = {entry.value for weight in weights for entry in weight.external_data if entry.key == "location"}
    return sum(file.stat().st_size for file in (path, *(path.parent / other for other in others)))


def _positive(text):
    value = _count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be a positive integer, not 0")
    return value


def _count(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer, not {text!r}")
    return int(text)


def _positive_float(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return value


def _batch_size(text):
    return text if text == "dynamic" else _positive(text)


def _input_shape(text):
    name, _, sizes = text.rpartition("=")
    if not re.fullmatch(r"([1-9]\d*|none)(,([1-9]\d*|none))*", sizes):
        raise argparse.ArgumentTypeError(
            f"must be positive sizes or none, like 224,224,3 or image=none,none,3, not {text!r}"
        )
    return name or None, tuple(None if size == "none" else int(size) for size in sizes.split(","))
