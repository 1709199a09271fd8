"""What the README and the documentation say can be run, and runs."""

import importlib
import json
import pathlib
import pkgutil
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
API = sorted(ROOT.glob("docs/api/*.md"))
PYTHON = {page.name: [code for language, code in blocks(page.read_text()) if language == "python"] for page in PAGES}

# All pages in one process, because imports take longer than most of the code. Each block is executed on its own.
RUN = """
import json, keras, os, pathlib, sys, tempfile, traceback
home, errors, policy = pathlib.Path.cwd(), {}, keras.config.dtype_policy()
for page, codes in json.load(sys.stdin).items():
    folder = home / page
    folder.mkdir()
    os.chdir(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    for number, code in enumerate(codes):
        try:
            exec(compile(code, f"{page}, block {number}", "exec"), {"__name__": "__main__"})
        except BaseException:
            errors.setdefault(page, traceback.format_exc())
        keras.config.set_dtype_policy(policy)
        keras.utils.clear_session()
(home / "errors.json").write_text(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What failed in the code of the pages, by page."""
    folder = tmp_path_factory.mktemp("pages")
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(PYTHON), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "errors.json").read_text())


def public_package(stem):
    """The package that a page of the reference is about."""
    return importlib.import_module(stem if stem == "keras_proxynorm" else f"keras_proxynorm.{stem}")


def test_the_two_commands_come_first():
    assert [language for language, _ in BLOCKS[:3]] == ["bash", "bash", "python"]
    main_job, tests = BLOCKS[0][1], BLOCKS[1][1]
    assert main_job.count("\n") == tests.count("\n") == 1
    assert "pip install" in main_job and main_job.rstrip().endswith("examples/quickstart.py")
    assert "pip install" in tests and tests.rstrip().endswith("-m pytest")


def test_five_lines_are_five():
    assert len(PYTHON["README.md"][0].strip().splitlines()) == 5


@pytest.mark.parametrize("page", [name for name, code in PYTHON.items() if code])
def test_code_runs(page, errors):
    assert page not in errors, errors[page]


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
    pages = {page.stem: (tmp_path / "html" / "api" / f"{page.stem}.html").read_text() for page in API}
    for stem, page in pages.items():
        package = public_package(stem)
        documented = re.findall(rf'id="{re.escape(package.__name__)}\.(\w+)"', page)
        assert sorted(set(documented)) == sorted(package.__all__), stem
        assert "Parameters" in page or "Attributes" in page


def test_every_package_is_public_or_internal():
    packages = {info.name for info in pkgutil.iter_modules(keras_proxynorm.__path__) if info.ispkg}
    public = {page.stem for page in API} - {"keras_proxynorm"}
    # What others are made of: their names may change, but for what a public package takes from them.
    assert packages | {"export"} == public | {"folding", "graph", "kernels", "layers", "moments", "observation"}
