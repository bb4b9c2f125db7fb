// Steps in an eigenbasis on CPU, and orthonormal bases by Cholesky QR.
#pragma once

#include <vector>

#include "factor.h"

namespace megatron_opt {

// One block: L ← decay·L + gain·g·gᵀ, R ← decay·R + gain·gᵀ·g where there are factors; then g ← Q_L·[Adam of Q_Lᵀ·g·Q_R]·Q_Rᵀ, both moments advance in the basis; a side without a basis has a null pointer.
struct Projection {
  float* g;
  float* m;
  float* v;
  const float* left;  // (rows, rows), contiguous
  const float* right;  // (cols, cols), contiguous
  float* factors[2];  // of each side, contiguous; null where they do not change
  int64_t ldg, ldm, ldv, rows, cols;
};

struct FactorStep {
  float gain, decay;
};

void project_adam_cpu(const RotatedAdam& settings, const FactorStep& factor_step, const std::vector<Projection>& blocks, int threads);

// Orthonormal q (n, n) of the QR decomposition of x (n, n), diag R > 0, both contiguous.
struct Basis {
  const float* x;
  float* q;
  int64_t n;
};

// Per basis whether Cholesky QR found it: not where a column is rounding noise (R_jj ≤ noise·max R) or columns are so dependent
// that two passes leave them oblique; q is then zero.
std::vector<char> cholesky_qr_cpu(const std::vector<Basis>& bases, double noise, int threads);

// A block whose bases are refreshed from its factors: m turns from the old ones into the new ones, v follows their columns.
struct Refresh {
  float* m;
  float* v;
  int64_t ldm, ldv, rows, cols;
  float* bases[2];  // of each side: (rows, rows), (cols, cols), contiguous; null without one
  const float* factors[2];
};

struct PowerStep {
  float shift, floor;  // A + shift·(largest qᵀAq)·I is iterated; qᵀAq up to floor·largest is rounding noise
  double noise[2];  // as for `cholesky_qr_cpu`, by side
};

// Per block whether its bases were found: not where a column of one is noise or Cholesky QR gives up; the block stays as it was.
std::vector<char> refresh_cpu(const PowerStep& settings, const std::vector<Refresh>& blocks, int threads);

}  // namespace megatron_opt
