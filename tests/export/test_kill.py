"""Exports are killed at every step: the target is what it was, or complete, or not there, and never half."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from layers.samples import normal

from keras_proxynorm.export import export_onnx, export_saved_model, onnx_weights

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("tf2onnx")

pytestmark = [tensorflow_only, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")]

X = normal(1, 6)

# Imports once and forks for every job. A job dies at its given step: the number of a change of the file system in the
# target's directory (counted by an audit hook, which Python calls before each), or while it is verifying.
WORKER = """
import json, os, signal, sys
import keras, numpy as np, onnx, tensorflow, tf2onnx.convert
import keras_proxynorm as kp
from keras_proxynorm.export import export_onnx, export_saved_model
from keras_proxynorm.export import onnx_weights


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run(kind, target, overwrite, step, large, slowly):
    if large:
        onnx_weights._LARGE, onnx_weights._LARGEST_FILE = 100, 100
    steps = 0
    armed = False

    def count(event, arguments):
        nonlocal steps
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")
        changes = changes or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        if armed and changes and os.path.dirname(target) in str(arguments[0]):
            if steps == step:
                die()
            steps += 1

    sys.addaudithook(count)
    model = keras.Sequential([keras.Input((6,), name="x"), keras.layers.Dense(512)])
    model.add(kp.LayerNormProxy(activation="silu"))
    model.add(keras.layers.Dense(4))
    model.layers[0].kernel.assign(np.cos(np.arange(6 * 512.0)).reshape(6, 512))

    def verify(*arguments, **options):
        if step == "verify":
            die()
        while slowly:
            pass

    armed = True
    if kind == "onnx":
        export_onnx(model, target, overwrite=overwrite, verify=verify)
    else:
        directory, version = os.path.split(target)
        export_saved_model(model, directory, version=int(version), overwrite=overwrite, verify=verify)
    return steps


print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            steps = run(**json.loads(line))
            os.write(1, b"steps %d\\n" % steps)
        except BaseException as error:
            os.write(1, b"error %r\\n" % repr(error).encode())
        os._exit(0)
    print("pid", pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)
"""


class Worker:
    def __init__(self):
        env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        assert self.read() == "ready"

    def read(self):
        return self.process.stdout.readline().strip()

    def start(self, kind, target, overwrite=False, step=None, large=False, slowly=False):
        job = {"kind": kind, "target": str(target), "overwrite": overwrite}
        job.update(step=step, large=large, slowly=slowly)
        print(json.dumps(job), file=self.process.stdin, flush=True)
        word, pid = self.read().split()
        assert word == "pid"
        return int(pid)

    def finish(self):
        """How many steps there were, or None if it was killed."""
        line, end = self.read(), None
        if line != "killed":
            end = self.read()
            assert end == "ended" and line.startswith("steps"), line
        return None if end is None else int(line.split()[1])

    def run(self, *arguments, **options):
        self.start(*arguments, **options)
        return self.finish()


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.process.stdin.close()
    worker.process.wait(timeout=60)


class Target:
    """A place for an artefact, perhaps with an old one, and what can be there."""

    def __init__(self, kind, directory, overwrite, large=False, monkeypatch=None):
        self.kind, self.overwrite, self.large, self.directory = kind, overwrite, large, directory
        self.path = directory / ("model.onnx" if kind == "onnx" else "1")
        self.old = None
        self.restore(monkeypatch)

    def restore(self, monkeypatch):
        """Puts an artefact of another model there."""
        if self.overwrite:
            keras.utils.set_random_seed(1)
            model = keras.Sequential([keras.Input((6,), name="x"), keras.layers.Dense(512, activation="tanh")])
            model.add(keras.layers.Dense(4))
            with monkeypatch.context() as context:
                if self.large:
                    context.setattr(onnx_weights, "_LARGE", 10)
                    context.setattr(onnx_weights, "_LARGEST_FILE", 10)
                if self.kind == "onnx":
                    export_onnx(model, self.path, overwrite=True)
                else:
                    export_saved_model(model, self.directory, version=1, overwrite=True)
            self.old = np.asarray(model(X))
            assert self.state() == "old"

    def arguments(self):
        return {"kind": self.kind, "target": self.path, "overwrite": self.overwrite, "large": self.large}

    def state(self):
        """What is at the target; it has to load and run."""
        if not self.path.exists():
            return "nothing"
        if self.kind == "onnx":
            (output,) = ort.InferenceSession(self.path, providers=["CPUExecutionProvider"]).run(None, {"x": X})
        else:
            import tensorflow as tf

            (output,) = tf.saved_model.load(self.path).signatures["serving_default"](x=tf.constant(X)).values()
        assert output.shape == (1, 4) and np.isfinite(output).all()
        return "old" if self.old is not None and np.allclose(output, self.old, atol=1e-6) else "new"

    def others(self):
        """Whatever else somebody who lists the directory might take for an artefact."""
        ours = {self.path, *self.directory.glob("model.onnx-*.data")}
        return [path for path in self.directory.iterdir() if path not in ours and not path.name.startswith(".")]


KINDS = [("onnx", False), ("saved_model", False), ("onnx", True)]
every_kind = pytest.mark.parametrize("kind, large", KINDS, ids=["onnx", "saved_model", "onnx of two files"])
with_and_without = pytest.mark.parametrize("overwrite", [False, True], ids=["first", "overwrite"])


def expected_states(overwrite):
    return {"old", "nothing", "new"} if overwrite else {"nothing", "new"}


@pytest.mark.parametrize("kind, large, overwrite", [("saved_model", False, False), *((*case, True) for case in KINDS)])
def test_killed_at_the_last_steps(kind, large, overwrite, worker, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = Target(kind, tmp_path / "whole", overwrite, large, monkeypatch)
    steps = worker.run(**whole.arguments())
    assert steps > 2 and whole.state() == "new"
    states = []
    # The last ones move it into place and clean up.
    for step in range(max(0, steps - 5), steps):
        directory = tmp_path / str(step)
        directory.mkdir()
        target = Target(kind, directory, overwrite, large, monkeypatch)
        assert worker.run(**target.arguments(), step=step) is None
        states.append(target.state())
        assert target.others() == []
    assert set(states) <= expected_states(overwrite)
    # From what it was to the new one, and never back.
    order = ["old", "nothing", "new"]
    assert states == sorted(states, key=order.index) and states[-1] == "new"
    assert states[0] == ("old" if overwrite else "nothing")


@every_kind
def test_killed_while_it_is_verified(kind, large, worker, tmp_path, monkeypatch):
    target = Target(kind, tmp_path, True, large, monkeypatch)
    assert worker.run(**target.arguments(), step="verify") is None
    assert target.state() == "old" and target.others() == []


@pytest.mark.parametrize("kind, overwrite", [("onnx", True), ("saved_model", False)])
def test_killed_at_its_first_file(kind, overwrite, worker, tmp_path, monkeypatch):
    target = Target(kind, tmp_path, overwrite, False, monkeypatch)
    before = set(tmp_path.rglob("*"))
    pid = worker.start(**target.arguments(), slowly=True)
    deadline = time.monotonic() + 60
    while set(tmp_path.rglob("*")) <= before and time.monotonic() < deadline:
        pass
    os.kill(pid, signal.SIGKILL)
    assert worker.finish() is None
    assert target.state() == ("old" if overwrite else "nothing")


@pytest.mark.parametrize("kind", ["onnx", "saved_model"])
def test_what_is_left_is_in_nobodys_way(kind, worker, tmp_path, monkeypatch):
    target = Target(kind, tmp_path, False, False, monkeypatch)
    assert worker.run(**target.arguments(), step="verify") is None
    assert target.state() == "nothing" and list(tmp_path.iterdir()) != []
    assert worker.run(**target.arguments()) is not None
    assert target.state() == "new" and target.others() == []
    if kind == "saved_model":  # the next version is the second
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
        assert export_saved_model(model, tmp_path).name == "2"


@pytest.mark.slow
@every_kind
@with_and_without
def test_killed_at_any_step(kind, large, overwrite, worker, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    steps = worker.run(**Target(kind, tmp_path / "whole", overwrite, large, monkeypatch).arguments())
    for step in range(steps):
        directory = tmp_path / str(step)
        directory.mkdir()
        target = Target(kind, directory, overwrite, large, monkeypatch)
        assert worker.run(**target.arguments(), step=step) is None
        assert target.state() in expected_states(overwrite) and target.others() == []


@pytest.mark.slow
@every_kind
@with_and_without
def test_killed_at_random(kind, large, overwrite, worker, tmp_path, monkeypatch):
    rng = random.Random(0)
    (tmp_path / "whole").mkdir()
    start = time.monotonic()
    worker.run(**Target(kind, tmp_path / "whole", overwrite, large, monkeypatch).arguments())
    duration = time.monotonic() - start
    states = []
    for number in range(12):
        directory = tmp_path / str(number)
        directory.mkdir()
        target = Target(kind, directory, overwrite, large, monkeypatch)
        pid = worker.start(**target.arguments())
        time.sleep(rng.uniform(0, 1.2 * duration))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        worker.finish()
        states.append(target.state())
        assert target.others() == []
    assert set(states) <= expected_states(overwrite)


@pytest.mark.slow
@pytest.mark.verified
@pytest.mark.parametrize("kind", ["onnx", "saved_model"])
def test_killed_from_outside(kind, tmp_path):
    """An export as a user runs it, verification and all, in a process of its own."""
    model = keras.Sequential([keras.Input((6,), name="x"), keras.layers.Dense(4)])
    model.save(tmp_path / "model.keras")
    call = {"onnx": "export_onnx(model, target)", "saved_model": "export_saved_model(model, target, version=1)"}[kind]
    script = (
        "import sys, keras\nfrom keras_proxynorm.export import export_onnx, export_saved_model\n"
        f"model = keras.saving.load_model(sys.argv[1])\ntarget = sys.argv[2]\n{call}\n"
    )
    rng = random.Random(0)
    for number in range(4):
        directory = tmp_path / str(number)
        directory.mkdir()
        target = Target(kind, directory, False)
        place = target.path if kind == "onnx" else directory
        process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "model.keras", place])
        while not any(pathlib.Path(directory).iterdir()) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 8) * (number > 0))
        process.kill()
        process.wait()
        assert target.state() in ("nothing", "new")
