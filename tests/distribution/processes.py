"""Runs the modules of this folder in processes of their own, with a time limit, and their output in what fails."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import pytest

TESTS = pathlib.Path(__file__).parents[1]
TIMEOUT = 300  # seconds; on an idle machine it takes a tenth of that


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def stop(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def report(command, status, log):
    log.seek(0)
    ended = "did not end by itself" if status is None else f"ended with {status}"
    return f"{' '.join(map(str, command))}: {ended}\n{log.read()[-4000:]}"


def run_together(*commands, **environment):
    """Runs Python with each list of arguments, all at the same time. Whatever happens, none is left running."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(TESTS), **environment}
    processes = []
    with contextlib.ExitStack() as stack:
        stack.callback(stop, processes)
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        for command, log in zip(commands, logs, strict=True):
            arguments = [sys.executable, *map(str, command)]
            processes.append(subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment))
        deadline = time.monotonic() + TIMEOUT
        # Until one fails: the others would wait for it, and for minutes.
        while not any(statuses := [process.poll() for process in processes]) and None in statuses:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if any(status != 0 for status in statuses):
            pytest.fail("\n".join(map(report, commands, statuses, logs)), pytrace=False)
