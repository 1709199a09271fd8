"""A path that is being written is the old thing or the new one, and nothing else is left."""

import pathlib

import pytest

from keras_proxynorm.export.atomic import check_free, local_path, replacing


def write(path, content, directory):
    if directory:
        path.mkdir()
        path = path / "part"
    path.write_text(content)


def read(path):
    return (path / "part" if path.is_dir() else path).read_text()


kinds = pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])


@kinds
def test_appears_when_complete(directory, tmp_path, files):
    path = tmp_path / "a" / "b" / "target"
    with replacing(path, overwrite=False) as new:
        write(new, "new", directory)
        assert not path.exists() and new.parent.parent == path.parent
    assert read(path) == "new"
    assert files() == ["a", "a/b", "a/b/target"] + ["a/b/target/part"] * directory


# export_onnx refuses to put a file where a directory is.
@pytest.mark.parametrize("directory, was_directory", [(False, False), (True, False), (True, True)])
def test_replaces_when_complete(directory, was_directory, tmp_path, files):
    path = tmp_path / "target"
    write(path, "old", was_directory)
    with replacing(path, overwrite=True) as new:
        write(new, "new", directory)
        assert read(path) == "old"
    assert read(path) == "new"
    assert files() == ["target"] + ["target/part"] * directory


@kinds
def test_failure_leaves_nothing(directory, tmp_path, files):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a" / "b" / "target", overwrite=False) as new:
        write(new, "half", directory)
        raise KeyboardInterrupt
    assert files() == []


def test_failure_leaves_parents_that_others_use(tmp_path, files):
    path = tmp_path / "a" / "target"
    with pytest.raises(OSError, match="full"), replacing(path, overwrite=False):
        (path.parent / "other").touch()
        raise OSError("full")
    assert files() == ["a", "a/other"]


@kinds
def test_failure_leaves_the_old(directory, tmp_path, files):
    path = tmp_path / "target"
    write(path, "old", directory)
    before = files()
    with pytest.raises(OSError, match="full"), replacing(path, overwrite=True) as new:
        write(new, "half", directory)
        raise OSError("full")
    assert files() == before and read(path) == "old"


@kinds
def test_failure_of_the_last_step_leaves_the_old(directory, tmp_path, files, monkeypatch):
    path = tmp_path / "target"
    write(path, "old", directory)
    before = files()

    def fail(self, target):
        raise OSError("no")

    monkeypatch.setattr(pathlib.Path, "replace", fail)
    with pytest.raises(OSError, match="no"), replacing(path, overwrite=True) as new:
        write(new, "new", directory)
    assert files() == before and read(path) == "old"


@kinds
def test_what_came_in_between_stays(directory, tmp_path, files):
    path = tmp_path / "target"
    with pytest.raises(FileExistsError, match="overwrite"), replacing(path, overwrite=False) as new:
        write(new, "new", directory)
        write(path, "other", directory)
    assert read(path) == "other"
    assert files() == ["target"] + ["target/part"] * directory


def test_existing_target(tmp_path):
    path = tmp_path / "target"
    check_free(path, overwrite=False)
    path.touch()
    check_free(path, overwrite=True)
    with pytest.raises(FileExistsError, match="target.*overwrite=True"):
        check_free(path, overwrite=False)
    with pytest.raises(FileExistsError), replacing(path, overwrite=False):
        pytest.fail("nothing may be written")


def test_local_path():
    assert local_path("path", "a/b") == local_path("path", pathlib.Path("a", "b")) == pathlib.Path("a/b")
    for value in (None, 3, b"a", "s3://bucket/a"):
        with pytest.raises(ValueError, match="Argument `somewhere`.*Received: somewhere="):
            local_path("somewhere", value)
