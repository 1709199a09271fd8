"""Loggers are quiet for as long as they should be, and their errors are kept."""

import io
import logging

import pytest

from keras_proxynorm.export.logs import errors_of
from keras_proxynorm.export.logs import quiet


@pytest.fixture
def logger():
    logger = logging.getLogger("keras_proxynorm_tests")
    handler = logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.read = handler.stream.getvalue
    yield logger
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_quiet_shows_errors_alone(logger):
    with quiet(logger.name):
        logger.warning("warning")
        logger.setLevel(logging.INFO)
        logger.info("info")
        logger.error("error")
    assert logger.read() == "error\n"
    logger.info("after")
    assert logger.read() == "error\nafter\n"


def test_quiet_ends_with_an_error(logger):
    with pytest.raises(KeyError), quiet(logger.name):
        raise KeyError
    assert logger.filters == []


def test_errors_are_collected(logger, caplog):
    with errors_of(logger.name) as errors:
        logger.getChild("child").error("lost %s", "op")
        logger.warning("not this")
    assert errors == ["lost op"]
    assert caplog.records == []
    logger.error("after")
    assert errors == ["lost op"] and [record.message for record in caplog.records] == ["after"]


def test_collecting_ends_with_an_error(logger):
    handlers = list(logger.handlers)
    with pytest.raises(KeyError), errors_of(logger.name):
        raise KeyError
    assert logger.propagate and logger.handlers == handlers
