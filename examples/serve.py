"""Serves an exported model with Ray Serve, sends it images one by one, and measures throughput and latency.

    pip install "keras_proxynorm[examples,serve]"
    python serve.py
    python serve.py --model saved_model  # what quickstart.py or export_saved_model wrote: saved_model/1/ and so on
    python serve.py --model digits.onnx  # run by ONNX Runtime
    python serve.py --keep  # until Ctrl-C, for clients of your own

Without --model it trains a small network on handwritten digits first. Each replica is a process with one thread for the
model, and needs neither Keras nor keras_proxynorm. Requests and answers are those of TensorFlow Serving's REST API, so
the same images can be sent there, to compare:

    python serve.py --output out
    docker run -p 8501:8501 -v "$PWD/out/digits:/models/digits" -e MODEL_NAME=digits tensorflow/serving
    python serve.py --url http://127.0.0.1:8501/v1/models/digits:predict --model out/digits

The data (1797 grey images of 8x8 pixels) comes with scikit-learn; nothing is downloaded. It takes about a minute.

HTTP is for this machine alone, but Ray's own ports are open to its network: try it behind a firewall.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import NamedTuple

# Read when TensorFlow is imported: print errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from quickstart import build_model, load_data, train

from keras_proxynorm.export import export_saved_model

NAME = "digits"
HOST = "127.0.0.1"
EPOCHS = 5
WARM_UP_SECONDS = 1
LARGEST_DIFFERENCE = 1e-4


def load_saved_model(version):
    """A function from a batch of images to the outputs, run by TensorFlow."""
    import tensorflow as tf

    model = tf.saved_model.load(version)
    ((name, spec),) = model.signatures["serving_default"].structured_input_signature[1].items()

    def run(images):
        # TensorFlow does not check, and images of a wrong rank would end the process.
        if not spec.shape.is_compatible_with(images.shape):
            raise ValueError(f"the model takes instances of shape {spec.shape}, not {images.shape}")
        # Looked up in each call, because a signature alone does not keep its variables alive.
        (output,) = model.signatures["serving_default"](**{name: tf.constant(images)}).values()
        return output.numpy()

    return run


def load_onnx(file):
    """The same, run by ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options)
    (given,) = session.get_inputs()

    def run(images):
        (output,) = session.run(None, {given.name: images})
        return output

    return run


def load(artefact):
    return load_onnx(artefact) if artefact.suffix == ".onnx" else load_saved_model(artefact)


class Predictor:
    """What a replica runs. Ray sends it by value, so that a replica imports nothing of this script."""

    def __init__(self, artefact):
        # Proves that these are not needed: they cannot be imported from here on. A server of your own has no such line.
        sys.modules.update({"keras": None, "keras_proxynorm": None})
        # Read when TensorFlow is imported. For more throughput there are more replicas.
        os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1", TF_CPP_MIN_LOG_LEVEL="3")
        self.run = load(artefact)

    async def __call__(self, request):
        from starlette.responses import JSONResponse

        try:
            instances = (await request.json())["instances"]
            return {"predictions": self.run(np.array(instances, "float32")).tolist()}
        except Exception as error:
            # Any error is the request's, as in TensorFlow Serving; the replica continues.
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=400)


class Answer(NamedTuple):
    """The server's answer to one of the images."""

    index: int
    seconds: float
    prediction: list[float]


def import_ray():
    # Read when Ray starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.serve
    except ImportError as error:
        sys.exit(f'This example needs Ray Serve: pip install "keras_proxynorm[serve]" ({error})')
    return ray


@contextlib.contextmanager
def serving(artefact, port, replicas):
    """Serves a model as long as the body runs; gives the URL to send requests to."""
    ray = import_ray()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # To log each request would take longer than a small model.
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    path = f"/v1/models/{NAME}:predict"
    try:
        ray.init(
            "local",  # not a cluster that happens to run here
            num_cpus=replicas,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        ray.serve.start(http_options={"host": HOST, "port": port}, logging_config=quiet)
        deployment = ray.serve.deployment(Predictor, num_replicas=replicas, ray_actor_options={"num_cpus": 1})
        ray.serve.run(deployment.bind(artefact.resolve()), name=NAME, route_prefix=path, logging_config=quiet)
        yield f"http://{HOST}:{port}{path}"
    finally:
        ray.shutdown()


def request_body(image):
    # One image, because models are exported for batch size 1.
    return json.dumps({"instances": [image.tolist()]}).encode()


def send_images(url, bodies, first, stop):
    """Sends images one after the other, each after the answer to the preceding one, until `stop` is set."""
    parts = urllib.parse.urlsplit(url)
    answers = []
    with contextlib.closing(http.client.HTTPConnection(parts.netloc, timeout=30)) as connection:
        for index in itertools.chain(range(first, len(bodies)), itertools.cycle(range(len(bodies)))):
            if stop.is_set():
                return answers
            start = time.perf_counter()
            connection.request("POST", parts.path, bodies[index], {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            seconds = time.perf_counter() - start
            if response.status != 200:
                raise http.client.HTTPException(f"{response.status} {content.decode(errors='replace')}")
            answers.append(Answer(index, seconds, json.loads(content)["predictions"][0]))


def run_load(url, bodies, clients, seconds):
    """Runs concurrent clients, which begin at different images; returns the answers and the elapsed seconds."""
    stop = threading.Event()
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        starts = [client * len(bodies) // clients for client in range(clients)]
        futures = [pool.submit(send_images, url, bodies, first, stop) for first in starts]
        try:
            concurrent.futures.wait(futures, seconds, return_when=concurrent.futures.FIRST_EXCEPTION)
        finally:
            stop.set()
    return [answer for future in futures for answer in future.result()], time.perf_counter() - start


def measure(url, images, labels, logits, clients, seconds):
    """Measures a server under load, prints the figures, and exits if an answer is wrong."""
    bodies = [request_body(image) for image in images]
    try:
        # The first calls compile and allocate.
        run_load(url, bodies, clients, WARM_UP_SECONDS)
        answers, elapsed = run_load(url, bodies, clients, seconds)
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"\nNo answer from {url}: {error}")

    indices, latencies, predictions = map(np.array, zip(*answers, strict=True))
    difference = np.abs(predictions - logits[indices]).max()
    answered, where = np.unique(indices, return_index=True)
    accuracy = np.mean(predictions[where].argmax(axis=-1) == labels[answered])
    median, high = np.percentile(1000 * latencies, [50, 99])
    print(f"\n{len(answers)} requests with one image each in {elapsed:.1f} s, {clients} at a time:\n")
    print(f"{'throughput':>16}{'p50':>12}{'p99':>12}{'accuracy':>12}{'difference':>14}")
    print(f"{len(answers) / elapsed:>12.0f} /s {median:>9.2f} ms{high:>9.2f} ms{accuracy:>12.4f}{difference:>14.1e}")
    print(
        f"\nLatency: seen by the client, JSON and HTTP included. Accuracy: on {len(answered)} test images. Difference: "
        "the largest\nof all answers from the logits that the model gives without a server."
    )
    # Not `>`: a NaN is a failure too.
    if not difference <= LARGEST_DIFFERENCE:
        sys.exit(f"\nThe difference is larger than {LARGEST_DIFFERENCE}: the server gives wrong answers.")


def train_and_export(directory, train_images, train_labels, test_images):
    """Trains and exports; returns the directory of the SavedModel and the logits of the Keras model."""
    print(f"Training on {len(train_images)} images:")
    model = build_model()
    train(model, train_images, train_labels, EPOCHS)
    return export_saved_model(model, directory), model.predict(test_images, verbose=0)


def run_directly(artefact, images):
    """The logits of a model that is run here, image by image."""
    try:
        run = load(artefact)
        return np.concatenate([run(image[np.newaxis]) for image in images])
    except Exception as error:
        sys.exit(f"{artefact} is no model that takes one image of 8x8x1 at a time and gives logits: {error}")


def find_artefact(path):
    """The .onnx file, or the highest version in the directory of a model; None if it is neither."""
    if path.suffix == ".onnx":
        return path if path.is_file() else None
    files = path.glob("*/saved_model.pb")
    versions = [file.parent for file in files if file.parent.name.isdecimal()]
    return max(versions, key=lambda version: int(version.name), default=None)


def free_port(port):
    """The port, or a free one for 0; raises an OSError if it is taken."""
    with socket.create_server((HOST, port)) as server:
        return server.getsockname()[1]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="PATH", help="DIR with DIR/1/ etc., or a .onnx file")
    parser.add_argument("--url", help="of a server that runs already and serves --model; none is started")
    parser.add_argument("--replicas", type=int, default=1, help="processes that run the model; default: 1")
    parser.add_argument("--port", type=int, default=0, help="default: one that is free")
    parser.add_argument("--clients", type=int, default=2, help="requests at a time; default: 2")
    parser.add_argument("--seconds", type=float, default=5, help="to send images for; default: 5")
    parser.add_argument("--keep", action="store_true", help="go on serving, until Ctrl-C")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: a new temporary directory")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches; default: 0")
    arguments = parser.parse_args()
    for name in ("replicas", "clients"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    if not arguments.seconds > 0:
        parser.error(f"--seconds must be more than 0, not {arguments.seconds}")
    if arguments.model is not None:
        artefact = find_artefact(arguments.model)
        if artefact is None:
            parser.error(
                f"--model must be a .onnx file or a directory with versions such as {arguments.model / '1'}, each with "
                f"a saved_model.pb, and {arguments.model} is not"
            )
        arguments.model = artefact
    if arguments.url is not None:
        parts = urllib.parse.urlsplit(arguments.url)
        if parts.scheme != "http" or not parts.hostname or not parts.path:
            parser.error(f"--url must be like http://{HOST}:8501/v1/models/{NAME}:predict, not {arguments.url}")
        if arguments.model is None or arguments.keep or arguments.output is not None:
            parser.error("--url must go with --model, what is served there, and without --keep and --output")
        return arguments
    try:
        arguments.port = free_port(arguments.port)
    except (OSError, OverflowError) as error:
        parser.error(f"--port must be a port that is free, and {arguments.port} is not: {error}")
    if arguments.output is None:
        arguments.output = Path(tempfile.mkdtemp(prefix="keras_proxynorm-"))
    elif arguments.output.exists() and (not arguments.output.is_dir() or any(arguments.output.iterdir())):
        parser.error(f"--output must be a new or an empty directory, and {arguments.output} is not")
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def main():
    arguments = parse_arguments()
    if arguments.url is None:
        import_ray()  # so that a missing package is reported before the training
    keras.utils.set_random_seed(arguments.seed)
    train_images, images, train_labels, labels = load_data(arguments.seed)

    if arguments.model is None:
        artefact, logits = train_and_export(arguments.output / NAME, train_images, train_labels, images)
    else:
        artefact, logits = arguments.model, run_directly(arguments.model, images)
    load_options = images, labels, logits, arguments.clients, arguments.seconds
    if arguments.url is not None:
        return measure(arguments.url, *load_options)

    request_file = arguments.output / "request.json"
    request_file.write_bytes(request_body(images[0]))
    print(f"\nStarting Ray Serve with {arguments.replicas} replica{'s' * (arguments.replicas > 1)} of {artefact}")
    with serving(artefact, arguments.port, arguments.replicas) as url:
        measure(url, *load_options)
        if arguments.keep:
            print(f"\nServing until Ctrl-C. To send an image:\n\n    curl -d @{request_file} {url}", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()


if __name__ == "__main__":
    main()
