// CPU kernels for processors with AVX-512. The standard headers come before the pragma: their functions are for everyone.
#include <cmath>
#include <cstdint>
#include <cstring>

#define MOPT_ISA avx512
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#include "blocks.h"

namespace megatron_opt {
Kernels avx512_kernels() { return kernels("avx512"); }
}  // namespace megatron_opt
#else
#include "kernels.h"

namespace megatron_opt {
Kernels avx512_kernels() { return portable_kernels(); }
}  // namespace megatron_opt
#endif
