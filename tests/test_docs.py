"""What the README and the documentation say can be run, and runs."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import keras_proxynorm

ROOT = pathlib.Path(__file__).parents[1]


def blocks(text):
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


README = (ROOT / "README.md").read_text()
BLOCKS = blocks(README)
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PYTHON = {page.name: [code for language, code in blocks(page.read_text()) if language == "python"] for page in PAGES}

# Each block by itself, with nothing of the one before but the imports, which take longer than most of them.
RUN = """
import json, keras, sys
for number, code in enumerate(json.load(sys.stdin)):
    exec(compile(code, f"block {number}", "exec"), {"__name__": "__main__"})
    keras.utils.clear_session()
"""


def test_the_two_commands_come_first():
    assert [language for language, _ in BLOCKS[:3]] == ["bash", "bash", "python"]
    main_job, tests = BLOCKS[0][1], BLOCKS[1][1]
    assert main_job.count("\n") == tests.count("\n") == 1
    assert "pip install" in main_job and main_job.rstrip().endswith("examples/quickstart.py")
    assert "pip install" in tests and tests.rstrip().endswith("-m pytest")


def test_five_lines_are_five():
    assert len(PYTHON["README.md"][0].strip().splitlines()) == 5


@pytest.mark.parametrize("page", [name for name, code in PYTHON.items() if code])
def test_code_runs(page, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(PYTHON[page]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    files = [target.partition("#")[0] for target in targets]
    assert not [file for file in files if file and not (page.parent / file).exists()]


def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason='the documentation needs: pip install "keras_proxynorm[docs]"')
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-d", str(tmp_path / "cache"), "docs"]
    done = subprocess.run([*command, str(tmp_path / "html")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "html" / "api" / "keras_proxynorm.html").read_text()
    for name in keras_proxynorm.__all__:
        assert f'id="keras_proxynorm.{name}"' in reference, name
