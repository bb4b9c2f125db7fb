// megatron_opt._C with the CUDA kernels in place of the CPU's, and what the tests want besides.
#include <pybind11/pybind11.h>

#include "cpu/multi_tensor.h"
#include "cuda/symmetric.h"
#include "cuda_on_host.h"
#include "operators.h"
#include "race.h"

namespace on_host {
Machine machine;
}

namespace megatron_opt {
[[noreturn]] static void absent() { throw std::runtime_error("this module has no CPU kernels"); }
void update_cpu(UpdateKind, const Options&, const std::vector<TensorEntry>&, int) { absent(); }
void sum_cpu(Sum, const Options&, const std::vector<TensorEntry>&, double*, int) { absent(); }
void block_adam_cpu(const Coefficients&, const std::vector<BlockEntry>&, int) { absent(); }
}  // namespace megatron_opt

PYBIND11_MODULE(_C, m) {
  m.attr("source_hash") = MEGATRON_OPT_SOURCE_HASH;
  m.attr("torch_version") = MEGATRON_OPT_TORCH_VERSION;
  m.attr("cuda") = true;
  m.attr("products") = false;
  m.attr("bf16_products") = false;
  m.def("cpu_kernels", [] { return "CUDA on the host"; });
  m.def("register_operators", megatron_opt::register_operators);
  m.def("shuffle", [](uint64_t seed) { on_host::machine.random = 2 * seed + 1; });
  m.def("launches", [] { return on_host::machine.launches; });
  m.def("symmetric", [](uintptr_t a, uintptr_t d, uintptr_t out, int64_t batch, int64_t n, int64_t k, float alpha, float beta) {
    const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    megatron_opt::symmetric_cuda({at(a), at(d), at(out), n, k, alpha, beta}, batch, nullptr);
  });
  m.def("reverse", [](uintptr_t x, int barriers) { reverse_cuda(reinterpret_cast<float*>(x), barriers); });
}
