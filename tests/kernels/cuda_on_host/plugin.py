"""A pytest plugin: megatron_opt._C is the module that CUDA_ON_HOST names, and what is not written is NaN."""

import importlib.util
import os
import sys

import torch

spec = importlib.util.spec_from_file_location("megatron_opt._C", os.environ["CUDA_ON_HOST"])
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["megatron_opt._C"] = module
torch.use_deterministic_algorithms(True, warn_only=True)  # empty tensors are filled with NaN
assert torch.empty(64).isnan().all()
