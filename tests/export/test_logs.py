"""Loggers are quiet for as long as they should be, and their errors are kept."""

import contextlib
import io
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from keras_proxynorm.export.logs import errors_of, quiet


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
    child = logger.getChild("child")
    with errors_of(logger.name) as errors:
        child.error("lost %s", "op")
        logger.warning("not this")
    assert errors == ["lost op"]
    assert caplog.records == []
    logger.error("after")
    assert errors == ["lost op"] and [record.message for record in caplog.records] == ["after"]


def test_collecting_ends_with_an_error(logger):
    with pytest.raises(KeyError), errors_of(logger.name):
        raise KeyError
    assert logger.filters == []


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_other_threads_are_heard(logger, caplog):
    with errors_of(logger.name) as errors, quiet(logger.name):
        in_another_thread(lambda: logger.error("theirs"))
        in_another_thread(lambda: logger.warning("theirs, too"))
        logger.error("ours")
    assert errors == ["ours"]
    assert [record.message for record in caplog.records] == ["theirs", "theirs, too"]


def test_blocks_of_two_threads_overlap(logger, caplog):
    with errors_of(logger.name) as errors:
        theirs = contextlib.ExitStack()
        in_another_thread(lambda: theirs.enter_context(errors_of(logger.name)))
    theirs.close()
    logger.error("after")
    assert errors == [] and [record.message for record in caplog.records] == ["after"]
    assert logger.filters == []


@pytest.mark.parametrize("first", [0, 1])
def test_overlapping_blocks_stay_quiet(first, logger):
    blocks = [contextlib.ExitStack(), contextlib.ExitStack()]
    for block in blocks:
        block.enter_context(quiet(logger.name))
    blocks[first].close()
    logger.warning("warning")
    blocks[1 - first].close()
    assert logger.read() == ""
