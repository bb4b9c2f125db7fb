// The Python module: facts about the build. The operators themselves are torch's (operators.cpp).
#include <pybind11/pybind11.h>

#include "cpu/multi_tensor.h"
#include "cpu/product.h"
#include "operators.h"

PYBIND11_MODULE(_C, m) {
  m.attr("source_hash") = MEGATRON_OPT_SOURCE_HASH;
  m.attr("torch_version") = MEGATRON_OPT_TORCH_VERSION;
#ifdef MEGATRON_OPT_WITH_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
  m.def("register_operators", [] {
    megatron_opt::register_operators();
    megatron_opt::register_matrix_operators();
    megatron_opt::register_preconditioner_operators();
  });
  m.attr("products") = megatron_opt::has_products();
  m.attr("bf16_products") = megatron_opt::has_bf16_products();
  m.def("cpu_kernels", &megatron_opt::cpu_kernels_name);
}
