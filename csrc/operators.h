#pragma once

namespace megatron_opt {

// Give torch the native kernels of the megatron_opt operators; at most once.
void register_operators();
void register_matrix_operators();
void register_preconditioner_operators();

}  // namespace megatron_opt
