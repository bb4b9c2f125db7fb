// The standard headers come before the pragma: their functions are for everyone.
#include "product.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define MOPT_PRODUCTS 1
#endif

namespace megatron_opt {

#ifdef MOPT_PRODUCTS

bool has_products() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

bool has_bf16_products() { return has_products() && __builtin_cpu_supports("avx512bf16"); }

int64_t scratch_floats(int64_t k) { return (k + kPanel) * kPanel + 16; }

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 105593: its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace {

constexpr int kRows = 12;  // rows of C in a register tile: 12 × 32 sums fill 24 of the 32 registers

void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

__mmask16 lanes(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>(count > 0 ? (1 << count) - 1 : 0);
}

// Vectors of 16 numbers as fp32, whatever they are stored as.
__m512 load16(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
__m512 load16(const uint16_t* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
void store16(float* to, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }
void store16(uint16_t* to, __mmask16 mask, __m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i quiet = _mm512_set1_epi32(0x7fc0);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
}

// Dwords of B for 32 columns: one fp32, or two bf16 that follow each other along k.
using Dword = uint32_t;

int64_t dwords(const float*, int64_t k) { return k; }
int64_t dwords(const uint16_t*, int64_t k) { return (k + 1) / 2; }

// Panel of 32 columns whose values lie in rows (B transposed): transposes dwords.
template <class T>
void pack_rows(const T* b, int64_t ldb, int64_t columns, int64_t depth, Dword* panel) {
  const int64_t step = sizeof(T) == 4 ? 1 : 2;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t valid = columns - 16 * half;
    for (int64_t at = 0; at < depth; at += 16) {
      __m512i r[16];
      const __mmask16 mask = lanes(depth - at);
      for (int i = 0; i < 16; ++i) {
        r[i] = i < valid ? _mm512_maskz_loadu_epi32(mask, b + (16 * half + i) * ldb + at * step) : _mm512_setzero_si512();
      }
      transpose16(r);
      const int64_t left = std::min<int64_t>(16, depth - at);
      for (int64_t i = 0; i < left; ++i) _mm512_storeu_si512(panel + (at + i) * kPanel + 16 * half, r[i]);
    }
  }
}

// Panel of 32 columns of a row-major B.
void pack_columns(const float* b, int64_t ldb, int64_t columns, int64_t k, Dword* panel) {
  const __mmask16 low = lanes(columns), high = lanes(columns - 16);
  for (int64_t i = 0; i < k; ++i) {
    _mm512_storeu_si512(panel + i * kPanel, _mm512_maskz_loadu_epi32(low, b + i * ldb));
    _mm512_storeu_si512(panel + i * kPanel + 16, _mm512_maskz_loadu_epi32(high, b + i * ldb + 16));
  }
}

void pack_columns(const uint16_t* b, int64_t ldb, int64_t columns, int64_t k, Dword* panel) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __mmask32 mask = columns >= 32 ? 0xffffffffu : (1u << columns) - 1u;
  for (int64_t i = 0; i < k; i += 2) {
    const __m512i even = _mm512_maskz_loadu_epi16(mask, b + i * ldb);
    const __m512i odd = i + 1 < k ? _mm512_maskz_loadu_epi16(mask, b + (i + 1) * ldb) : _mm512_setzero_si512();
    _mm512_storeu_si512(panel + i / 2 * kPanel, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_storeu_si512(panel + i / 2 * kPanel + 16, _mm512_permutex2var_epi16(even, high, odd));
  }
}

inline __m512 multiply_add(const float*, __m512i a, __m512i b, __m512 sum) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}
inline __m512 multiply_add(const uint16_t*, __m512i a, __m512i b, __m512 sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// A tile of R rows and 32 columns over the whole depth, sums in registers; then alpha·sum + beta·d to c.
template <int R, class T>
void tile(const Product<T>& p, const Dword* panel, int64_t depth, int64_t row, int64_t column) {
  const Dword* a = reinterpret_cast<const Dword*>(p.a + row * p.lda);
  const int64_t row_step = p.lda * static_cast<int64_t>(sizeof(T)) / 4;
  __m512 sum[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < depth; ++i) {
    const __m512i b0 = _mm512_loadu_si512(panel + i * kPanel), b1 = _mm512_loadu_si512(panel + i * kPanel + 16);
    const Dword* at = a + i;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512i value = _mm512_set1_epi32(static_cast<int>(at[r * row_step]));
      sum[r][0] = multiply_add(p.a, value, b0, sum[r][0]);
      sum[r][1] = multiply_add(p.a, value, b1, sum[r][1]);
    }
  }
  const __mmask16 mask[2] = {lanes(p.n - column), lanes(p.n - column - 16)};
  const __m512 alpha = _mm512_set1_ps(p.alpha), beta = _mm512_set1_ps(p.beta);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < 2; ++h) {
      __m512 value = _mm512_mul_ps(alpha, sum[r][h]);
      if (p.d != nullptr) {
        value = _mm512_fmadd_ps(beta, load16(p.d + (row + r) * p.ldd + column + 16 * h, mask[h]), value);
      }
      store16(p.c + (row + r) * p.ldc + column + 16 * h, mask[h], value);
    }
  }
}

template <class T>
void rows_of_tiles(int rows, const Product<T>& p, const Dword* panel, int64_t depth, int64_t row, int64_t column) {
  switch (rows) {
#define MOPT_TILE(R) \
  case R:            \
    return tile<R>(p, panel, depth, row, column)
    MOPT_TILE(1);
    MOPT_TILE(2);
    MOPT_TILE(3);
    MOPT_TILE(4);
    MOPT_TILE(5);
    MOPT_TILE(6);
    MOPT_TILE(7);
    MOPT_TILE(8);
    MOPT_TILE(9);
    MOPT_TILE(10);
    MOPT_TILE(11);
    MOPT_TILE(12);
#undef MOPT_TILE
  }
}

template <class T>
void panels(const Product<T>& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t depth = dwords(p.b, p.k);
  Dword* panel = reinterpret_cast<Dword*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
  for (int64_t j = begin; j < end; ++j) {
    const int64_t column = j * kPanel, columns = std::min<int64_t>(kPanel, p.n - column);
    if (p.b_transposed) {
      pack_rows(p.b + column * p.ldb, p.ldb, columns, depth, panel);
    } else {
      pack_columns(p.b + column, p.ldb, columns, p.k, panel);
    }
    const int64_t start = p.symmetric ? column / kRows * kRows : 0;
    for (int64_t row = start; row < p.m; row += kRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kRows, p.m - row));
      rows_of_tiles(rows, p, panel, depth, row, column);
    }
  }
}

template <class T>
void mirror_blocks(T* c, int64_t ld, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    for (int64_t j = 0; j <= i; j += 16) {
      __m512i r[16];
      const __mmask16 across = lanes(n - j), down = lanes(n - i);
      for (int64_t k = 0; k < 16; ++k) {
        r[k] = i + k < n ? _mm512_castps_si512(load16(c + (i + k) * ld + j, across)) : _mm512_setzero_si512();
      }
      transpose16(r);
      for (int64_t k = 0; k < 16 && j + k < n; ++k) {
        // On the diagonal only what lies right of it is written.
        const __mmask16 mask = i == j ? static_cast<__mmask16>(down & ~((2u << k) - 1u)) : down;
        store16(c + (j + k) * ld + i, mask, _mm512_castsi512_ps(r[k]));
      }
    }
  }
}

template <class From, class To>
void copy_blocks(const From* from, int64_t ld_from, bool transposed, float scale, To* to, int64_t ld, int64_t rows,
                 int64_t cols) {
  const __m512 factor = _mm512_set1_ps(scale);
  if (!transposed) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; j += 16) {
        const __mmask16 mask = lanes(cols - j);
        store16(to + i * ld + j, mask, _mm512_mul_ps(factor, load16(from + i * ld_from + j, mask)));
      }
    }
    return;
  }
  for (int64_t j = 0; j < cols; j += 16) {
    for (int64_t i = 0; i < rows; i += 16) {
      __m512i r[16];
      const __mmask16 across = lanes(rows - i), down = lanes(cols - j);
      for (int64_t k = 0; k < 16; ++k) {
        r[k] = j + k < cols ? _mm512_castps_si512(load16(from + (j + k) * ld_from + i, across)) : _mm512_setzero_si512();
      }
      transpose16(r);
      for (int64_t k = 0; k < 16 && i + k < rows; ++k) {
        store16(to + (i + k) * ld + j, down, _mm512_mul_ps(factor, _mm512_castsi512_ps(r[k])));
      }
    }
  }
}

}  // namespace

void product_panels(const Product<float>& p, int64_t begin, int64_t end, float* scratch) { panels(p, begin, end, scratch); }
void product_panels(const Product<uint16_t>& p, int64_t begin, int64_t end, float* scratch) {
  panels(p, begin, end, scratch);
}
void mirror(float* c, int64_t ld, int64_t n) { mirror_blocks(c, ld, n); }
void mirror(uint16_t* c, int64_t ld, int64_t n) { mirror_blocks(c, ld, n); }

void scaled_copy(const float* from, int64_t ld_from, bool transposed, float scale, uint16_t* to, int64_t ld, int64_t rows,
                 int64_t cols) {
  copy_blocks(from, ld_from, transposed, scale, to, ld, rows, cols);
}
void scaled_copy(const float* from, int64_t ld_from, bool transposed, float scale, float* to, int64_t ld, int64_t rows,
                 int64_t cols) {
  copy_blocks(from, ld_from, transposed, scale, to, ld, rows, cols);
}
void scaled_copy(const uint16_t* from, int64_t ld_from, bool transposed, float scale, float* to, int64_t ld,
                 int64_t rows, int64_t cols) {
  copy_blocks(from, ld_from, transposed, scale, to, ld, rows, cols);
}

void add_diagonal(float* c, int64_t ld, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) c[i * ld + i] += value;
}
void add_diagonal(uint16_t* c, int64_t ld, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t* at = c + i * ld + i;
    store16(at, 1, _mm512_add_ps(load16(at, 1), _mm512_set1_ps(value)));
  }
}

double sum_of_squares(const float* x, int64_t count) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

#pragma GCC pop_options

#else

bool has_products() { return false; }
bool has_bf16_products() { return false; }
int64_t scratch_floats(int64_t) { return 0; }
void product_panels(const Product<float>&, int64_t, int64_t, float*) {}
void product_panels(const Product<uint16_t>&, int64_t, int64_t, float*) {}
void mirror(float*, int64_t, int64_t) {}
void mirror(uint16_t*, int64_t, int64_t) {}
void scaled_copy(const float*, int64_t, bool, float, uint16_t*, int64_t, int64_t, int64_t) {}
void scaled_copy(const float*, int64_t, bool, float, float*, int64_t, int64_t, int64_t) {}
void scaled_copy(const uint16_t*, int64_t, bool, float, float*, int64_t, int64_t, int64_t) {}
void add_diagonal(float*, int64_t, int64_t, float) {}
void add_diagonal(uint16_t*, int64_t, int64_t, float) {}
double sum_of_squares(const float*, int64_t) { return 0.0; }

#endif

}  // namespace megatron_opt
