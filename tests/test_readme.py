"""What the README says can be run, and runs."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def test_the_two_commands_come_first():
    assert [language for language, _ in BLOCKS[:3]] == ["bash", "bash", "python"]
    main_job, tests = BLOCKS[0][1], BLOCKS[1][1]
    assert main_job.count("\n") == tests.count("\n") == 1
    assert "pip install" in main_job and main_job.rstrip().endswith("examples/quickstart.py")
    assert "pip install" in tests and tests.rstrip().endswith("-m pytest")


def test_five_lines_are_five():
    assert len(PYTHON[0].strip().splitlines()) == 5


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_code_runs(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
