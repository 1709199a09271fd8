"""What libraries log during an export: notes and warnings are not shown, errors are collected."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

__all__ = ["errors_of", "quiet"]


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Makes the loggers of these names, but not their children, drop what this thread logs below an error."""
    with _filtered([logging.getLogger(name) for name in names], lambda record: record.levelno >= logging.ERROR):
        yield


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[list[str]]:
    """Collects the errors that this thread logs, and shows nothing of what it logs.

    Args:
        name: Name of a logger. Its children count, those that exist.

    Yields:
        A list that the messages are appended to.
    """
    messages: list[str] = []

    def collect(record):
        if record.levelno >= logging.ERROR:
            messages.append(record.getMessage())
        return False

    names = [name, *(other for other in list(logging.root.manager.loggerDict) if other.startswith(f"{name}."))]
    with _filtered([logging.getLogger(name) for name in names], collect):
        yield messages


@contextlib.contextmanager
def _filtered(loggers: list[logging.Logger], passes: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Makes loggers drop what does not pass, of what this thread logs."""
    thread = threading.get_ident()

    # A filter of its own for each block. And no levels: TensorFlow sets that of absl while it saves.
    def passes_here(record):
        return threading.get_ident() != thread or passes(record)

    for logger in loggers:
        logger.addFilter(passes_here)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes_here)
