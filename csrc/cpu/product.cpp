// The standard headers come before the pragma: their functions are for everyone.
#include "product.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define MOPT_PRODUCTS 1
#endif

#ifdef MOPT_PRODUCTS

namespace megatron_opt {

bool has_products() {
  static const bool has = [] {
    const char* forced = std::getenv("MEGATRON_OPT_ISA");
    return (forced == nullptr || std::strcmp(forced, "avx512") == 0) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }();
  return has;
}

bool has_bf16_products() { return has_products() && __builtin_cpu_supports("avx512bf16"); }

int64_t scratch_floats(int64_t k) { return (k + kPanel) * kPanel + 16; }

}  // namespace megatron_opt

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 105593: its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "tiles.h"

namespace megatron_opt {
namespace {

template <class T>
void panels(const Product<T>& p, int64_t first, int64_t last, float* scratch) {
  const int64_t depth = dwords(p.b, p.k);
  Dword* panel = reinterpret_cast<Dword*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
  const int64_t tiles = (p.m + kRows - 1) / kRows * (last - first);
  const int64_t share = (p.ahead_count / std::max<int64_t>(p.symmetric ? tiles * 3 / 4 : tiles, 1) + 15) / 16 * 16;
  const float *ahead = p.ahead, *ahead_end = p.ahead + p.ahead_count;
  for (int64_t j = first; j < last; ++j) {
    const int64_t column = j * kPanel, columns = std::min<int64_t>(kPanel, p.n - column);
    if (p.b_transposed) {
      pack_rows(p.b + column * p.ldb, p.ldb, columns, depth, panel);
    } else {
      pack_columns(p.b + column, p.ldb, columns, p.k, panel);
    }
    // Depths where a triangular B has entries in these columns.
    const int64_t low = p.b_shape == Triangle::lower ? std::min(column, depth) : 0;
    const int64_t high = p.b_shape == Triangle::upper ? std::min(depth, column + columns) : depth;
    const int64_t start = p.symmetric ? column / kRows * kRows : 0;
    for (int64_t row = start; row < p.m; row += kRows) {
      for (const float* stop = std::min(ahead + share, ahead_end); ahead < stop; ahead += 16) __builtin_prefetch(ahead, 0, 2);
      const int rows = static_cast<int>(std::min<int64_t>(kRows, p.m - row));
      const int64_t begin = p.a_shape == Triangle::upper ? std::max(low, row) : low;
      const int64_t end = p.a_shape == Triangle::lower ? std::min(high, row + rows) : high;
      rows_of_tiles(rows, p, panel, std::min(begin, end), end, row, column);
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

}  // namespace megatron_opt

#pragma GCC pop_options

#else

namespace megatron_opt {

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

}  // namespace megatron_opt

#endif
