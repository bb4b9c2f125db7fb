"""One module a command of `megatron-opt study`."""
