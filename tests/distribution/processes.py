"""Runs the modules of this folder in processes of their own, with a time limit, and their output in what fails."""

import contextlib
import os
import pathlib
import signal
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
        # Together with what it started, which is all in one process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def read(log):
    log.seek(0)
    return log.read()


def report(command, status, log):
    ended = "did not end by itself" if status is None else f"ended with {status}"
    return f"{' '.join(map(str, command))}: {ended}\n{read(log)[-4000:]}"


def run_together(*commands, **environment):
    """Runs Python with each list of arguments, all at the same time, and stops them all; returns what they printed."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(TESTS), **environment}
    processes = []
    with contextlib.ExitStack() as stack:
        stack.callback(stop, processes)
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        for command, log in zip(commands, logs, strict=True):
            arguments = [sys.executable, *map(str, command)]
            process = subprocess.Popen(
                arguments, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            processes.append(process)
        deadline = time.monotonic() + TIMEOUT
        # Until one fails: the others would wait for it, and for minutes.
        while not any(statuses := [process.poll() for process in processes]) and None in statuses:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if any(status != 0 for status in statuses):
            pytest.fail("\n".join(map(report, commands, statuses, logs)), pytrace=False)
        return [read(log) for log in logs]
