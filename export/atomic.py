"""Writes files and directories so that nothing incomplete is ever found under their names."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_proxynorm.arguments import argument_error, as_boolean

__all__ = ["check_free", "local_path", "replacing"]


def local_path(name: str, value: Any) -> Path:
    """The value of the argument called `name` as a path.

    Raises:
        ValueError: If it is not a path, or is one of another file system.
    """
    if not isinstance(value, (str, os.PathLike)) or "://" in str(value):
        raise argument_error(name, value, "a path of the local file system")
    return Path(value)


def check_free(path: Path, overwrite: bool) -> None:
    """Raises a FileExistsError if `path` exists and must not be overwritten."""
    if not as_boolean("overwrite", overwrite) and path.exists():
        raise FileExistsError(f"{str(path)!r} exists already; pass `overwrite=True` to replace it.")


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary path to write to, which becomes `path` if the body succeeds and is removed if it fails.

    Args:
        path: The file or directory to make. Missing parents are made, too, and removed after a failure.
        overwrite: Whether to replace an existing one, which stays in place until the new one is complete.

    Yields:
        A path on the same file system, at which nothing exists yet.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is False, at the start or at the end.
    """
    check_free(path, overwrite)
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Inside a temporary directory, because only its owner may read that.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            yield new
            check_free(path, overwrite)
            if path.exists() and new.is_dir():
                # A directory cannot replace another one in one step.
                path.rename(old)
            try:
                new.replace(path)
            except BaseException:
                if old.exists():
                    old.rename(path)
                raise
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
