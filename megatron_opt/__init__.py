"""megatron_opt: distributed optimizers and fair optimizer studies on Megatron-Core."""

__version__ = "0.1.0"
