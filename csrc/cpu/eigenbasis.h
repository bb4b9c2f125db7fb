// Steps in an eigenbasis on CPU, and orthonormal bases by Cholesky QR.
#pragma once

#include <vector>

#include "factor.h"

namespace megatron_opt {

// One block: u = Q_L·[Adam of Q_Lᵀ·g·Q_R]·Q_Rᵀ, both moments advance in the basis; a side without a basis has a null pointer.
struct Projection {
  const float* g;
  float* m;
  float* v;
  float* u;           // (rows, cols), contiguous
  const float* left;  // (rows, rows), contiguous
  const float* right;  // (cols, cols), contiguous
  int64_t ldg, ldm, ldv, rows, cols;
};

void project_adam_cpu(const RotatedAdam& settings, const std::vector<Projection>& blocks, int threads);

// Orthonormal q (n, n) of the QR decomposition of x (n, n), diag R > 0, both contiguous.
struct Basis {
  const float* x;
  float* q;
  int64_t n;
};

// Per basis whether Cholesky QR found it: not where a column is rounding noise (R_jj ≤ noise·max R) or columns are so dependent
// that two passes leave them oblique; q is then zero.
std::vector<char> cholesky_qr_cpu(const std::vector<Basis>& bases, double noise, int threads);

}  // namespace megatron_opt
