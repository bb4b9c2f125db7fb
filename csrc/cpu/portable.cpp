// CPU kernels for any processor.
#define MOPT_ISA portable
#include "blocks.h"

namespace megatron_opt {
Kernels portable_kernels() { return kernels("portable"); }
}  // namespace megatron_opt
