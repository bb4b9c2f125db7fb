"""The device of these tests: a CUDA GPU, or skipped; MEGATRON_OPT_GPU_TESTS=cpu tries the tests themselves on the CPU."""

import os

import pytest
import torch

from megatron_opt.kernels.dispatch import native_available


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the operations under test run."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("MEGATRON_OPT_GPU_TESTS") == "cpu":
        return torch.device("cpu")
    pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def kernels(device: torch.device) -> torch.device:
    """The same, where our kernels are built for it."""
    if not native_available(device):
        pytest.skip(f"the extension has no kernels for {device.type}; MEGATRON_OPT_CUDA=1 builds them")
    return device


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """A device with streams and graphs."""
    if device.type != "cuda":
        pytest.skip("graphs are captured on CUDA alone")
    return device
