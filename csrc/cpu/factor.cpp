// The standard headers come before the pragma: their functions are for everyone.
#include "factor.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "product.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define MOPT_PRODUCTS 1
#endif

#ifdef MOPT_PRODUCTS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 105593: its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "tiles.h"

namespace megatron_opt {
namespace {

// Rows row … row+R−1 of the solution for a panel that holds the ones before; out may be null.
template <int R>
void solve_tile(const Solve& s, float* panel, int64_t row, float* out, const __mmask16 (&mask)[2]) {
  const float* l = s.l + row * s.ldl;
  __m512 y[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    y[r][0] = _mm512_load_ps(panel + (row + r) * kPanel);
    y[r][1] = _mm512_load_ps(panel + (row + r) * kPanel + 16);
  }
  for (int64_t i = 0; i < row; ++i) {
    const __m512 b0 = _mm512_load_ps(panel + i * kPanel), b1 = _mm512_load_ps(panel + i * kPanel + 16);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512 value = _mm512_set1_ps(l[r * s.ldl + i]);
      y[r][0] = _mm512_fnmadd_ps(value, b0, y[r][0]);
      y[r][1] = _mm512_fnmadd_ps(value, b1, y[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 12
    for (int c = 0; c < r; ++c) {
      const __m512 value = _mm512_set1_ps(l[r * s.ldl + row + c]);
      y[r][0] = _mm512_fnmadd_ps(value, y[c][0], y[r][0]);
      y[r][1] = _mm512_fnmadd_ps(value, y[c][1], y[r][1]);
    }
    const __m512 pivot = _mm512_set1_ps(l[r * s.ldl + row + r]);
    for (int h = 0; h < 2; ++h) {
      y[r][h] = _mm512_div_ps(y[r][h], pivot);
      _mm512_store_ps(panel + (row + r) * kPanel + 16 * h, y[r][h]);
      if (out != nullptr) store16(out + (row + r) * s.ldo + 16 * h, mask[h], y[r][h]);
    }
  }
}

void solve_rows(const Solve& s, float* panel, float* out, const __mmask16 (&mask)[2]) {
  for (int64_t row = 0; row < s.k; row += kRows) {
    with_rows(std::min<int64_t>(kRows, s.k - row), [&](auto count) { solve_tile<count>(s, panel, row, out, mask); });
  }
}

float* aligned(float* scratch) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
}

}  // namespace

void solve_panels(const Solve& s, int64_t first, int64_t last, float* scratch) {
  float* panel = aligned(scratch);
  for (int64_t j = first; j < last; ++j) {
    const int64_t column = j * kPanel, columns = std::min<int64_t>(kPanel, s.n - column);
    if (s.x_transposed) {
      pack_rows(s.x + column * s.ldx, s.ldx, columns, s.k, reinterpret_cast<Dword*>(panel));
    } else {
      pack_columns(s.x + column, s.ldx, columns, s.k, reinterpret_cast<Dword*>(panel));
    }
    const __mmask16 mask[2] = {lanes(columns), lanes(columns - 16)};
    solve_rows(s, panel, s.out + column, mask);
  }
}

bool cholesky(float* g, int64_t ld, int64_t k, float* scratch) {
  float* panel = aligned(scratch);
  const __mmask16 none[2] = {0, 0};
  for (int64_t at = 0; at < k; at += kPanel) {
    const int64_t columns = std::min<int64_t>(kPanel, k - at);
    float* rows = g + at * ld;
    float* corner = rows + at;
    // Rows at … of L left of the diagonal are the solution of the columns above it; then what is left of the corner.
    pack_columns(g + at, ld, columns, at, reinterpret_cast<Dword*>(panel));
    solve_rows(Solve{g, nullptr, nullptr, ld, 0, 0, at, columns, false}, panel, nullptr, none);
    scaled_copy(panel, kPanel, true, 1.0f, rows, ld, columns, at);
    const Product<float> update{rows, nullptr, corner, corner, ld, 0, ld, ld, columns, columns, at, -1.0f, 1.0f, false, false};
    for (int64_t row = 0; row < columns; row += kRows) {
      rows_of_tiles(static_cast<int>(std::min<int64_t>(kRows, columns - row)), update, reinterpret_cast<Dword*>(panel), 0, at,
                    row, 0);
    }
    double l[kPanel][kPanel];  // by columns
    for (int64_t j = 0; j < columns; ++j) {
      double sums[kPanel] = {};
      for (int64_t i = j; i < columns; ++i) sums[i] = corner[i * ld + j];
      for (int64_t c = 0; c < j; ++c) {
        const double factor = l[c][j];
#pragma omp simd
        for (int64_t i = 0; i < kPanel; ++i) sums[i] -= l[c][i] * factor;
      }
      if (!(sums[j] > 0.0)) return false;
      const double pivot = std::sqrt(sums[j]);
#pragma omp simd
      for (int64_t i = 0; i < kPanel; ++i) l[j][i] = sums[i] / pivot;
      l[j][j] = pivot;
      for (int64_t i = j; i < columns; ++i) corner[i * ld + j] = static_cast<float>(l[j][i]);
    }
  }
  return true;
}

double sum_of_seconds(const RotatedAdam& c, const float* x, const float* v, int64_t count) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(c.beta2 * v[i] + c.input_weight2 * (x[i] * x[i]));
  return sum;
}

void rotated_adam(const RotatedAdam& c, float least, float* x, float* m, float* v, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    m[i] += c.input_weight1 * (x[i] - m[i]);
    v[i] = c.beta2 * v[i] + c.input_weight2 * (x[i] * x[i]);
    const float root = sqrtf(v[i]);
    x[i] = c.scale * m[i] / ((root < least ? least : root) + c.eps);
  }
}

}  // namespace megatron_opt

#pragma GCC pop_options

#else

namespace megatron_opt {

void solve_panels(const Solve&, int64_t, int64_t, float*) {}
bool cholesky(float*, int64_t, int64_t, float*) { return false; }
double sum_of_seconds(const RotatedAdam&, const float*, const float*, int64_t) { return 0.0; }
void rotated_adam(const RotatedAdam&, float, float*, float*, float*, int64_t) {}

}  // namespace megatron_opt

#endif
