// Matrix products of AVX-512: C = alpha·A·B + beta·D, all of C or its lower triangle mirrored where C is symmetric.
#pragma once

#include <cstdint>

namespace megatron_opt {

enum class Triangle : int { full, lower, upper };  // where a square operand has entries; the rest of it is zero

// Row-major operands. A is (m, k), or (k, m) with `a_transposed`; B is (k, n), or (n, k) with `b_transposed`. A bf16 operand needs rows padded with zeros to
// a multiple of 32 elements, as bf16 products take elements in pairs. C may be D; neither may be A or B.
template <class T>
struct Product {
  const T* a;
  const T* b;
  const T* d;  // null for beta = 0
  T* c;
  int64_t lda, ldb, ldd, ldc;
  int64_t m, n, k;
  float alpha, beta;
  bool b_transposed;
  bool symmetric;  // C = Cᵀ is known: half the work
  Triangle a_shape = Triangle::full, b_shape = Triangle::full;  // fp32 only: zeros are passed over
  bool a_transposed = false;  // fp32 only, for an A that stays in the first cache: rows are read across
  const float* ahead = nullptr;  // numbers that are wanted next: asked for tile by tile
  int64_t ahead_count = 0;
};

constexpr int64_t kPanel = 32;  // columns of C computed together

// Columns [32·begin, 32·end) of C; with `symmetric` only what is on and below the diagonal. `scratch` holds
// scratch_floats(k) floats.
void product_panels(const Product<float>& p, int64_t begin, int64_t end, float* scratch);
void product_panels(const Product<uint16_t>& p, int64_t begin, int64_t end, float* scratch);
int64_t scratch_floats(int64_t k);

// Copies the lower triangle of c (n, n) to the upper one.
void mirror(float* c, int64_t ld, int64_t n);
void mirror(uint16_t* c, int64_t ld, int64_t n);

// to = bf16 or fp32 of scale·from, (rows, cols) row-major; with `transposed`, `from` is (cols, rows).
void scaled_copy(const float* from, int64_t ld_from, bool transposed, float scale, uint16_t* to, int64_t ld, int64_t rows,
                 int64_t cols);
void scaled_copy(const float* from, int64_t ld_from, bool transposed, float scale, float* to, int64_t ld, int64_t rows,
                 int64_t cols);
void scaled_copy(const uint16_t* from, int64_t ld_from, bool transposed, float scale, float* to, int64_t ld,
                 int64_t rows, int64_t cols);

void add_diagonal(float* c, int64_t ld, int64_t n, float value);
void add_diagonal(uint16_t* c, int64_t ld, int64_t n, float value);

double sum_of_squares(const float* x, int64_t count);

// Whether this processor runs the functions above; bf16 needs AVX512_BF16 besides.
bool has_products();
bool has_bf16_products();

}  // namespace megatron_opt
