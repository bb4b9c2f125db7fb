// CPU kernels for processors with AVX2. The standard headers come before the pragma: their functions are for everyone.
#include <cmath>
#include <cstdint>
#include <cstring>

#define MOPT_ISA avx2
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64-v3")
#include "blocks.h"

namespace megatron_opt {
Kernels avx2_kernels() { return kernels("avx2"); }
}  // namespace megatron_opt
#else
#include "kernels.h"

namespace megatron_opt {
Kernels avx2_kernels() { return portable_kernels(); }
}  // namespace megatron_opt
#endif
