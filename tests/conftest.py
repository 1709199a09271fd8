"""State that a test may change is put back after it."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest


@pytest.fixture(autouse=True)
def _restored_state(request):
    policy = keras.config.dtype_policy()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(policy)
    # Collecting garbage takes longer than most tests, but large models are circular, and fill the memory without it.
    keras.utils.clear_session(free_memory=request.node.get_closest_marker("slow") is not None)
