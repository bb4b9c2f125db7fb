// Triangular solves and Cholesky factors of AVX-512, on the panels that the products use: a solve's result is packed as it is found.
#pragma once

#include <cstdint>

namespace megatron_opt {

// out = L⁻¹·x: L lower triangular (k, k), what lies above its diagonal is not read; x (k, n), or (n, k) with `x_transposed`.
struct Solve {
  const float* l;
  const float* x;
  float* out;
  int64_t ldl, ldx, ldo, k, n;
  bool x_transposed;
};

// Columns [32·first, 32·last) of the result; `scratch` holds scratch_floats(k) floats.
void solve_panels(const Solve& s, int64_t first, int64_t last, float* scratch);

// Lower Cholesky factor of symmetric g (k, k), in place; what lies above the diagonal is no part of it. False where a pivot is not
// positive: g is then of no use.
bool cholesky(float* g, int64_t ld, int64_t k, float* scratch);

// Adam on a rotated gradient: both moments advance, u = scale·m/(max(√v, least) + ε) replaces x.
struct RotatedAdam {
  float input_weight1, beta2, input_weight2, eps, scale, floor;  // least √v in a block over √mean(v)
};
void rotated_adam(const RotatedAdam& c, float least, float* x, float* m, float* v, int64_t count);
// Sum of the second moments that rotated_adam is about to leave.
double sum_of_seconds(const RotatedAdam& c, const float* x, const float* v, int64_t count);

}  // namespace megatron_opt
