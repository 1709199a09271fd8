"""State that a test may change is put back after it, and memory that a file took is free after it."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest


def pytest_collection_finish():
    # What is imported by now stays, and each collection of garbage would go through it.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _free_memory():
    yield
    # Models and traced functions are circular, and Python looks for old garbage too rarely.
    gc.collect()


@pytest.fixture(autouse=True)
def _restored_state(request):
    policy = keras.config.dtype_policy()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(policy)
    # Collecting garbage takes longer than most tests, but large models fill the memory without it.
    keras.utils.clear_session(free_memory=request.node.get_closest_marker("slow") is not None)
