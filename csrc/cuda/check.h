#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace megatron_opt {

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("megatron_opt: ") + cudaGetErrorString(status));
}

}  // namespace megatron_opt
