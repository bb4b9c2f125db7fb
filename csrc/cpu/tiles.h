// Register tiles of the AVX-512 products, for files that compile with its pragma: a panel of 32 columns is packed once, tiles of
// 12 rows go over it.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "product.h"

namespace megatron_opt {
namespace {

constexpr int kRows = 12;  // rows of C in a register tile: 12 × 32 sums fill 24 of the 32 registers

inline void transpose16(__m512i (&r)[16]) {
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

inline __mmask16 lanes(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>(count > 0 ? (1 << count) - 1 : 0);
}

// Vectors of 16 numbers as fp32, whatever they are stored as.
inline __m512 load16(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load16(const uint16_t* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
inline void store16(float* to, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }
inline void store16(uint16_t* to, __mmask16 mask, __m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i quiet = _mm512_set1_epi32(0x7fc0);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
}

// Dwords of B for 32 columns: one fp32, or two bf16 that follow each other along k.
using Dword = uint32_t;

inline int64_t dwords(const float*, int64_t k) { return k; }
inline int64_t dwords(const uint16_t*, int64_t k) { return (k + 1) / 2; }

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
inline void pack_columns(const float* b, int64_t ldb, int64_t columns, int64_t k, Dword* panel) {
  const __mmask16 low = lanes(columns), high = lanes(columns - 16);
  for (int64_t i = 0; i < k; ++i) {
    _mm512_storeu_si512(panel + i * kPanel, _mm512_maskz_loadu_epi32(low, b + i * ldb));
    _mm512_storeu_si512(panel + i * kPanel + 16, _mm512_maskz_loadu_epi32(high, b + i * ldb + 16));
  }
}

inline void pack_columns(const uint16_t* b, int64_t ldb, int64_t columns, int64_t k, Dword* panel) {
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

// A tile of R rows and 32 columns over depths begin … depth−1, sums in registers; then alpha·sum + beta·d to c.
template <int R, bool Across, class T>
void tile(const Product<T>& p, const Dword* panel, int64_t begin, int64_t depth, int64_t row, int64_t column) {
  const int64_t ld = p.lda * static_cast<int64_t>(sizeof(T)) / 4, row_step = Across ? 1 : ld, depth_step = Across ? ld : 1;
  const Dword* a = reinterpret_cast<const Dword*>(p.a) + row * row_step;
  __m512 sum[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t i = begin; i < depth; ++i) {
    const __m512i b0 = _mm512_loadu_si512(panel + i * kPanel), b1 = _mm512_loadu_si512(panel + i * kPanel + 16);
    const Dword* at = a + i * depth_step;
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

// work(R) with the number of rows, 1 … kRows, as a constant.
template <class Work>
void with_rows(int64_t rows, const Work& work) {
  switch (rows) {
#define MOPT_ROWS(R) \
  case R:            \
    return work(std::integral_constant<int, R>())
    MOPT_ROWS(1);
    MOPT_ROWS(2);
    MOPT_ROWS(3);
    MOPT_ROWS(4);
    MOPT_ROWS(5);
    MOPT_ROWS(6);
    MOPT_ROWS(7);
    MOPT_ROWS(8);
    MOPT_ROWS(9);
    MOPT_ROWS(10);
    MOPT_ROWS(11);
    MOPT_ROWS(12);
#undef MOPT_ROWS
  }
}

template <class T>
void rows_of_tiles(int rows, const Product<T>& p, const Dword* panel, int64_t begin, int64_t depth, int64_t row,
                   int64_t column) {
  with_rows(rows, [&](auto count) {
    if constexpr (sizeof(T) == 4) {
      if (p.a_transposed) return tile<count, true>(p, panel, begin, depth, row, column);
    }
    tile<count, false>(p, panel, begin, depth, row, column);
  });
}

}  // namespace
}  // namespace megatron_opt
