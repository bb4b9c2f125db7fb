// PSGD with triangular Kronecker factors on CPU: update of the factors and preconditioning, block by block in cache.
#pragma once

#include <cstdint>
#include <vector>

namespace megatron_opt {

// One block: where there is noise v, both factors learn from m + damping·v and v; then m ← Q₀ᵀQ₀·m·Q₁ᵀQ₁.
struct KronBlock {
  float* left;  // Q₀ (rows, rows) and Q₁ (cols, cols), upper triangular, contiguous
  float* right;
  float* m;
  const float* v;  // null: the factors stay
  int64_t ldm, ldv, rows, cols;
  float damping;
};

void kron_cpu(float lr, const std::vector<KronBlock>& blocks, int threads);

}  // namespace megatron_opt
