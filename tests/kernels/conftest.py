"""What tests of kernels share."""

import pytest
import torch


@pytest.fixture
def set_threads():
    """torch.set_num_threads, whose number is as it was after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
