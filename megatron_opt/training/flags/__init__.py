"""Every flag of Megatron-LM's parser: read on our path, without effect on numbers, or refused with a reason."""
