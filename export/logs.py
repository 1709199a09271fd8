"""The converters' logs: notes and warnings kept off the screen, errors turned into something that can be raised."""

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["errors_of", "quiet"]


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Lets the loggers of these names, but not their children, pass nothing below an error."""
    loggers = [logging.getLogger(name) for name in names]
    # Not their levels: TensorFlow sets that of absl while it saves.
    for logger in loggers:
        logger.addFilter(_is_error)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_error)


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[list[str]]:
    """Collects the errors that a logger and its children report, and shows nothing of what they report.

    Args:
        name: Name of the logger.

    Yields:
        A list that the messages are appended to.
    """
    messages: list[str] = []
    logger = logging.getLogger(name)
    handler = _Collector(messages)
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)


def _is_error(record):
    return record.levelno >= logging.ERROR


class _Collector(logging.Handler):
    def __init__(self, messages):
        super().__init__(logging.ERROR)
        self.messages = messages

    def emit(self, record):
        self.messages.append(record.getMessage())
