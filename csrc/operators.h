#pragma once

namespace megatron_opt {

// Gives torch the native kernels of the megatron_opt operators; at most once.
void register_operators();

}  // namespace megatron_opt
