"""Every optimizer of this project as a `torch.optim.Optimizer`: plain models, DDP, FSDP2 and other DTensor parameters."""

from megatron_opt.engine_options import EngineOptions
from megatron_opt.optimizers.groups import ParamGroupConfig
from megatron_opt.torch.optimizer import Optimizer

__all__ = ["EngineOptions", "Optimizer", "ParamGroupConfig"]
