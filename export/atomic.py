"""Writing a file or a directory so that its name never stands for something half-written."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_free", "local_path", "replacing"]


def local_path(name: str, value) -> Path:
    """The path that the argument called `name` stands for.

    Raises:
        ValueError: If it is not a path, or is one of another file system.
    """
    if not isinstance(value, (str, os.PathLike)) or "://" in str(value):
        raise ValueError(f"Argument `{name}` must be a path of the local file system. Received: {name}={value!r}")
    return Path(value)


def check_free(path: Path, overwrite: bool) -> None:
    """Raises a FileExistsError if something is at `path` that must stay there."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists already; pass `overwrite=True` to replace it.")


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary path to write to, which becomes `path` if the body succeeds and vanishes if it does not.

    Args:
        path: The file or directory to make; missing parents are made too, and go again after a failure.
        overwrite: Whether to replace what is there. It stays in place until the new one is complete.

    Yields:
        A path beside `path`, on the same file system, with nothing there.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is False, at the start or at the end.
    """
    check_free(path, overwrite)
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A directory around it, not itself made by tempfile, which would leave it readable by its owner alone.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            yield new
            check_free(path, overwrite)
            if path.exists() and new.is_dir():
                # A directory cannot take a place in one step.
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
