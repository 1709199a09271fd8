"""The parts of examples/serve.py, against a stand-in for the server, and all of it with Ray Serve."""

import contextlib
import http.client
import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import urllib.parse
import uuid

import numpy as np
import pytest
from backends import tensorflow_only
from scripts import ROOT, load_script

from keras_proxynorm.export import export_onnx, export_saved_model

pytestmark = tensorflow_only

SCRIPT = ROOT / "examples" / "serve.py"
IMAGES = np.random.default_rng(0).integers(0, 17, (7, 8, 8, 1)).astype("float32") / 16
LABELS = np.array([0, 1, 2, 3, 4, 5, 0])
# As a model would give that takes the last image, and no other, for another digit.
LOGITS = np.eye(10, dtype="float32")[[0, 1, 2, 3, 4, 5, 6]] + np.float32(0.1)


@pytest.fixture(scope="module")
def serve():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return load_script(SCRIPT)


@pytest.fixture(scope="module")
def artefacts(serve, tmp_path_factory):
    """The same small model, untrained, as a SavedModel and as an ONNX file."""
    folder, model = tmp_path_factory.mktemp("artefacts"), serve.build_model()
    # What exports verify, in processes of their own, the tests of exports check.
    export_saved_model(model, folder / "model", version=2, verify=False)
    onnx_file = export_onnx(model, folder / "model.onnx", verify=False)
    return {"saved_model": folder / "model", "onnx": onnx_file}


@contextlib.contextmanager
def server(answer):
    """A server that answers what `answer` makes of an instance; gives the URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            (instance,) = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["instances"]
            status, content = answer(np.array(instance))
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", len(body))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/v1/models/digits:predict"
        finally:
            running.shutdown()
            thread.join()


def answer_rightly(instance):
    (index,) = np.flatnonzero((instance == IMAGES).all(axis=(1, 2, 3)))
    return 200, {"predictions": [LOGITS[index].tolist()]}


def measure(serve, url, seconds=0.2):
    serve.measure(url, IMAGES, LABELS, LOGITS, clients=3, seconds=seconds)


def table(output):
    """The numbers that the script prints, by the names of their columns."""
    head, row = re.search(r"^( +throughput .*)\n(.*)$", output, flags=re.MULTILINE).groups()
    return dict(zip(head.split(), map(float, re.sub("/s|ms", "", row).split()), strict=True))


@pytest.fixture(autouse=True)
def _short_warm_up(serve, monkeypatch):
    monkeypatch.setattr(serve, "WARM_UP_SECONDS", 0.1)


def test_measure(serve, capsys):
    with server(answer_rightly) as url:
        measure(serve, url)
    found = table(capsys.readouterr().out)
    assert found["throughput"] > 10 and 0 < found["p50"] <= found["p99"] < 500
    assert found["accuracy"] == round(6 / 7, 4) and found["difference"] == 0


def test_every_image_is_sent_by_every_client(serve):
    bodies = [serve.request_body(image) for image in IMAGES]
    with server(answer_rightly) as url:
        answers, elapsed = serve.run_load(url, bodies, clients=2, seconds=0.3)
    assert 0.3 <= elapsed < 5
    assert {answer.index for answer in answers} == set(range(7))
    # The second client begins in the middle.
    starts = [answers[0].index, answers[[a.index for a in answers].index(3)].index]
    assert starts == [0, 3]
    for answer in answers:
        np.testing.assert_array_equal(np.array(answer.prediction, "float32"), LOGITS[answer.index])


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_one_wrong_answer_is_found(serve, wrong):
    def answer(instance):
        status, content = answer_rightly(instance)
        content["predictions"][0][0] += wrong * (instance == IMAGES[3]).all()
        return status, content

    with server(answer) as url, pytest.raises(SystemExit, match="wrong answers"):
        measure(serve, url)


def test_refused_requests_end_the_run(serve):
    with (
        server(lambda instance: (400, {"error": "wrong shape"})) as url,
        pytest.raises(SystemExit, match="No answer from .*:predict: 400 .*wrong shape"),
    ):
        measure(serve, url, seconds=60)


def test_no_server(serve):
    url = f"http://127.0.0.1:{serve.free_port(0)}/v1/models/digits:predict"
    with pytest.raises(SystemExit, match="No answer from .*refused"):
        measure(serve, url, seconds=60)


def test_loaders_agree(serve, artefacts):
    logits = {name: serve.run_directly(serve.find_artefact(path), IMAGES) for name, path in artefacts.items()}
    assert logits["onnx"].shape == (7, 10)
    np.testing.assert_allclose(logits["saved_model"], logits["onnx"], atol=1e-5)


@pytest.mark.parametrize("kind", ["saved_model", "onnx"])
def test_model_for_other_images(serve, artefacts, kind):
    artefact = serve.find_artefact(artefacts[kind])
    for images in (IMAGES[:, :4], IMAGES[..., 0]):
        with pytest.raises(SystemExit, match="is no model that takes one image of 8x8x1"):
            serve.run_directly(artefact, images)


def test_highest_version_is_served(serve, tmp_path):
    for name in ("2", "10", "latest", "11"):
        (tmp_path / name).mkdir()
        if name != "11":
            (tmp_path / name / "saved_model.pb").touch()
    assert serve.find_artefact(tmp_path) == tmp_path / "10"


def arguments(serve, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, options)])
    return serve.parse_arguments()


def test_arguments(serve, artefacts, monkeypatch, tmp_path):
    monkeypatch.setattr(serve.tempfile, "mkdtemp", lambda **_: str(tmp_path / "made"))
    found = arguments(serve, monkeypatch)
    assert found.model is None and found.port > 0 and found.output.is_dir()
    found = arguments(serve, monkeypatch, "--model", artefacts["saved_model"], "--output", tmp_path / "out")
    assert found.model == artefacts["saved_model"] / "2" and found.output == tmp_path / "out"
    assert arguments(serve, monkeypatch, "--model", artefacts["onnx"]).model == artefacts["onnx"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--replicas 0", "--replicas must be at least 1, not 0"),
        ("--clients 0", "--clients must be at least 1, not 0"),
        ("--seconds 0", "--seconds must be more than 0, not 0.0"),
        ("--seconds nan", "--seconds must be more than 0, not nan"),
        ("--port 99999", "--port must be a port that is free, and 99999 is not"),
        ("--model nowhere", "--model must be a .onnx file or a directory with versions such as nowhere/1"),
        ("--model nowhere.onnx", "and nowhere.onnx is not"),
        (f"--output {ROOT}", "--output must be a new or an empty directory"),
        ("--url 127.0.0.1:8501", "--url must be like http://127.0.0.1:8501/v1/models/digits:predict"),
        ("--url http://127.0.0.1:8501/x", "--url must go with --model"),
    ],
)
def test_bad_options(serve, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        arguments(serve, monkeypatch, *options.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_taken_port(serve, monkeypatch, capsys):
    with server(answer_rightly) as url, pytest.raises(SystemExit):
        arguments(serve, monkeypatch, "--port", urllib.parse.urlsplit(url).port)
    assert "--port must be a port that is free" in capsys.readouterr().err


def test_missing_package(serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=re.escape('pip install "keras_proxynorm[serve]"')):
        serve.import_ray()


@contextlib.contextmanager
def script(*options):
    """Runs the script; after it, none of its processes may be left."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-u", SCRIPT, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "MARK_OF_THIS_TEST": mark},
        start_new_session=True,
    )
    limit = threading.Timer(240, process.terminate)
    limit.start()
    try:
        yield process
    finally:
        limit.cancel()
        process.terminate()
        process.wait(60)
        process.stdout.close()
    left = []
    for environment in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in environment.read_bytes():
                left.append(environment.with_name("cmdline").read_bytes())
    assert left == []


def ask(url, method, body=None):
    parts = urllib.parse.urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(parts.netloc, timeout=60)) as connection:
        connection.request(method, parts.path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.mark.slow
def test_keeps_serving_until_interrupted(serve, artefacts, tmp_path):
    pytest.importorskip("ray.serve")
    with script("--model", artefacts["saved_model"], "--seconds", "1", "--keep", "--output", tmp_path) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if match := re.search(r"curl -d @(\S+) (\S+)", line):
                break
        output = "".join(lines)
        assert match, output
        assert table(output)["difference"] <= 1e-6
        url = match[2]
        status, answer = ask(url, "POST", pathlib.Path(match[1]).read_bytes())
        assert status == 200 and np.shape(answer["predictions"]) == (1, 10)
        # What is wrong with a request is no reason for the server to end.
        bad = [
            b"no JSON",
            b"{}",
            b'{"instances": [1, 2]}',
            b'{"instances": [[1], 2]}',
            serve.request_body(IMAGES[0, 1:]),
        ]
        for method, body in [*(("POST", body) for body in bad), ("GET", None)]:
            status, answer = ask(url, method, body)
            assert status == 400 and list(answer) == ["error"], body
        assert ask(url, "POST", serve.request_body(IMAGES[0]))[0] == 200
        # As Ctrl-C does: to all processes of the terminal.
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate()
        assert process.returncode == 0 and "Traceback" not in rest, rest


@pytest.mark.slow
def test_two_replicas_of_onnx_runtime(artefacts):
    pytest.importorskip("ray.serve")
    with script("--model", artefacts["onnx"], "--replicas", "2", "--clients", "4") as process:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert "2 replicas of" in output and table(output)["difference"] <= 1e-5


@pytest.mark.slow
def test_script(serve, tmp_path):
    pytest.importorskip("ray.serve")
    with script("--output", tmp_path / "out") as process:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    found = table(output)
    assert found["accuracy"] > 0.95 and found["difference"] <= 1e-4 and found["throughput"] > 5
    assert serve.find_artefact(tmp_path / "out" / "digits") == tmp_path / "out" / "digits" / "1"
