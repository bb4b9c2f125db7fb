#include "eigenbasis.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "teams.h"

namespace megatron_opt {
namespace {

using Buffer = std::vector<float>;

Product<float> plain(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t m, int64_t n, int64_t k,
                     bool b_transposed, bool symmetric = false) {
  return {a, b, nullptr, c, lda, ldb, 0, n, m, n, k, 1.0f, 0.0f, b_transposed, symmetric};
}

struct Buffers {
  Buffer first, second, transposed;
  Scratch scratch;
};

// What a product asks for on the way, one after another.
struct Wanted {
  const float* numbers[8] = {};
  int64_t counts[8] = {}, next = 0;

  Product<float> with(const Product<float>& p) {
    if (next == 8) return p;
    const int64_t i = next++;
    return ahead(p, numbers[i], counts[i]);
  }
};

// Q_Lᵀ·x·Q_R, or Q_L·x·Q_Rᵀ with `back`, of contiguous (rows, cols); the result lies in one of `x` and `other`.
float* rotate(float* x, float* other, int64_t rows, int64_t cols, const float* left, const float* right, bool back, int threads,
              Buffers& at, Wanted& wanted) {
  if (left != nullptr) {
    const Product<float> p = wanted.with(plain(left, rows, x, cols, other, rows, cols, rows, false));
    back ? run(p, threads, at.scratch) : run_transposed(p, threads, at.scratch, at.transposed);
    std::swap(x, other);
  }
  if (right != nullptr) {
    run(wanted.with(plain(x, cols, right, cols, other, rows, cols, cols, back)), threads, at.scratch);
    std::swap(x, other);
  }
  return x;
}

// floor·√mean(v) of a block whose second moments are about to advance; rows are added up in their order.
float least_root(const RotatedAdam& settings, const float* x, const Projection& b, int threads) {
  std::vector<double> sums(static_cast<size_t>(b.rows));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < b.rows; ++row) sums[row] = sum_of_seconds(settings, x + row * b.cols, b.v + row * b.ldv, b.cols);
  const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
  return settings.floor * static_cast<float>(std::sqrt(sum / static_cast<double>(b.rows * b.cols)));
}

void project(const RotatedAdam& settings, const FactorStep& factor_step, const Projection& b, const Projection* next, int threads,
             Buffers& at) {
  const int64_t rows = b.rows, cols = b.cols, count = rows * cols, left = rows * rows, right = cols * cols;
  at.first.resize(static_cast<size_t>(count));
  at.second.resize(static_cast<size_t>(count));
  float *x = at.first.data(), *other = at.second.data();
  Wanted wanted;
  if (next != nullptr) {
    wanted = {{next->g, next->factors[0], next->factors[1], next->left, next->right, next->m},
              {count, left, right, left, right, count}};
  }
  for (int side = 0; side < 2; ++side) {
    float* f = b.factors[side];
    const int64_t n = side == 0 ? rows : cols, k = side == 0 ? cols : rows;
    if (f == nullptr) continue;
    const Product<float> p = wanted.with(
        {b.g, b.g, f, f, b.ldg, b.ldg, n, n, n, n, k, factor_step.gain, factor_step.decay, side == 0, true});
    side == 0 ? run(p, threads, at.scratch) : run_transposed(p, threads, at.scratch, at.transposed);
  }
  // Into the basis; the first product reads g where it lies.
  if (b.left != nullptr) {
    run_transposed(wanted.with(plain(b.left, rows, b.g, b.ldg, x, rows, cols, rows, false)), threads, at.scratch, at.transposed);
    x = rotate(x, other, rows, cols, nullptr, b.right, false, threads, at, wanted);
  } else if (b.right != nullptr) {
    run(wanted.with(plain(b.g, b.ldg, b.right, cols, x, rows, cols, cols, false)), threads, at.scratch);
  } else {
    scaled_copy(b.g, b.ldg, false, 1.0f, x, cols, rows, cols);
  }
  other = x == at.first.data() ? at.second.data() : at.first.data();
  const float least = settings.floor > 0.0f ? least_root(settings, x, b, threads) : 0.0f;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    if (next != nullptr) {
      for (int64_t j = 0; j < cols; j += 16) __builtin_prefetch(next->v + row * next->ldv + j, 0, 2);
    }
    rotated_adam(settings, least, x + row * cols, b.m + row * b.ldm, b.v + row * b.ldv, cols);
  }
  // Out of it; the last product writes where g lay.
  x = rotate(x, other, rows, cols, b.left, nullptr, true, threads, at, wanted);
  if (b.right == nullptr) return scaled_copy(x, cols, false, 1.0f, b.g, b.ldg, rows, cols);
  Product<float> last = wanted.with(plain(x, cols, b.right, cols, b.g, rows, cols, cols, true));
  last.ldc = b.ldg;
  run(last, threads, at.scratch);
}

// Rows of a, scaled to a length of one, orthonormal by up to two Cholesky decompositions of a·aᵀ: to a or to q.
const float* orthonormal_rows(int64_t n, float* a, float* q, float* gram, double noise, int threads, Scratch& scratch) {
  Buffer lengths(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const double length = std::sqrt(sum_of_squares(a + i * n, n));
    if (!(length > 0.0) || length > std::numeric_limits<float>::max() || 1.0 / length > std::numeric_limits<float>::max()) {
      return nullptr;
    }
    lengths[i] = static_cast<float>(length);
    scaled_copy(a + i * n, n, false, static_cast<float>(1.0 / length), a + i * n, n, 1, n);
  }
  const auto decompose = [&] {
    scratch.resize(std::max<size_t>(scratch.size(), 1));
    scratch[0].resize(std::max(scratch[0].size(), static_cast<size_t>(scratch_floats(n))));
    return cholesky(gram, n, n, scratch[0].data());
  };
  run(plain(a, n, a, n, gram, n, n, n, true, true), threads, scratch);
  if (!decompose()) return nullptr;
  float largest = 0.0f, smallest = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    const float length = gram[i * n + i] * lengths[i];
    largest = std::max(largest, length);
    smallest = std::min(smallest, length);
  }
  if (!(smallest > noise * largest)) return nullptr;
  run(Solve{gram, a, q, n, n, n, n, n, false}, threads, scratch);
  run(plain(q, n, q, n, gram, n, n, n, true, true), threads, scratch);
  double oblique = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    gram[i * n + i] -= 1.0f;
    oblique += sum_of_squares(gram + i * n, n);
    gram[i * n + i] += 1.0f;
  }
  oblique = std::sqrt(oblique);
  if (oblique <= static_cast<double>(n) * std::numeric_limits<float>::epsilon()) return q;
  if (!(oblique < 0.5) || !decompose()) return nullptr;  // below, the second pass leaves rounding alone
  run(Solve{gram, q, a, n, n, n, n, n, false}, threads, scratch);
  return a;
}

struct RefreshBuffers : Buffers {
  Buffer image, rows, solved, gram, fresh[2];
  std::vector<int64_t> order[2];
};

// The basis after one power iteration, to at.fresh, and the order of the old one's columns, to at.order.
bool power_step(const PowerStep& settings, int side, int64_t n, const float* factor, const float* basis, int threads,
                RefreshBuffers& at, Wanted& wanted) {
  for (Buffer* buffer : {&at.image, &at.rows, &at.solved, &at.gram, &at.fresh[side], &at.transposed}) {
    buffer->resize(static_cast<size_t>(n * n));
  }
  float* image = at.image.data();
  run(wanted.with(plain(factor, n, basis, n, image, n, n, n, false)), threads, at.scratch);
  Buffer values(static_cast<size_t>(n), 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) values[j] += basis[i * n + j] * image[i * n + j];
  }
  const float largest = *std::max_element(values.begin(), values.end());
  const auto sound = [&](float value) { return value > settings.floor * largest; };
  if (!std::all_of(values.begin(), values.end(), sound)) return false;
  if (settings.shift != 0.0f) {
    for (int64_t i = 0; i < n * n; ++i) image[i] += settings.shift * largest * basis[i];
  }
  std::vector<int64_t>& order = at.order[side];
  order.resize(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  scaled_copy(image, n, true, 1.0f, at.transposed.data(), n, n, n);
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(at.transposed.data() + order[i] * n, n, at.rows.data() + i * n);
  }
  const float* orthonormal = orthonormal_rows(n, at.rows.data(), at.solved.data(), at.gram.data(), settings.noise[side], threads,
                                        at.scratch);
  if (orthonormal == nullptr) return false;
  scaled_copy(orthonormal, n, true, 1.0f, at.fresh[side].data(), n, n, n);
  return true;
}

bool refresh(const PowerStep& settings, const Refresh& b, const Refresh* next, int threads, RefreshBuffers& at) {
  const int64_t sizes[2] = {b.rows, b.cols}, rows = b.rows, cols = b.cols;
  const float* fresh[2] = {nullptr, nullptr};
  Wanted wanted;
  if (next != nullptr) {
    wanted = {{next->bases[0], next->bases[1], next->factors[0], next->factors[1], next->m, next->v},
              {rows * rows, cols * cols, rows * rows, cols * cols, rows * cols, rows * cols}};
  }
  for (int side = 0; side < 2; ++side) {
    if (b.bases[side] == nullptr) continue;
    if (!power_step(settings, side, sizes[side], b.factors[side], b.bases[side], threads, at, wanted)) return false;
    fresh[side] = at.fresh[side].data();
  }
  at.first.resize(static_cast<size_t>(rows * cols));
  at.second.resize(static_cast<size_t>(rows * cols));
  float *first = at.first.data(), *second = at.second.data();
  scaled_copy(b.m, b.ldm, false, 1.0f, first, cols, rows, cols);
  float* x = rotate(first, second, rows, cols, b.bases[0], b.bases[1], true, threads, at, wanted);
  x = rotate(x, x == first ? second : first, rows, cols, fresh[0], fresh[1], false, threads, at, wanted);
  scaled_copy(x, cols, false, 1.0f, b.m, b.ldm, rows, cols);
  scaled_copy(b.v, b.ldv, false, 1.0f, first, cols, rows, cols);
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = first + (fresh[0] != nullptr ? at.order[0][i] : i) * cols;
    for (int64_t j = 0; j < cols; ++j) b.v[i * b.ldv + j] = from[fresh[1] != nullptr ? at.order[1][j] : j];
  }
  for (int side = 0; side < 2; ++side) {
    if (fresh[side] != nullptr) std::copy_n(fresh[side], sizes[side] * sizes[side], b.bases[side]);
  }
  return true;
}

}  // namespace

void project_adam_cpu(const RotatedAdam& settings, const FactorStep& factor_step, const std::vector<Projection>& blocks,
                      int threads) {
  for_blocks<Buffers>(blocks, threads, [&](const Projection& block, const Projection* next, int64_t, int team, Buffers& buffers) {
    project(settings, factor_step, block, next, team, buffers);
  });
}

std::vector<char> refresh_cpu(const PowerStep& settings, const std::vector<Refresh>& blocks, int threads) {
  std::vector<char> success(blocks.size(), 0);
  for_blocks<RefreshBuffers>(
      blocks, threads, [&](const Refresh& block, const Refresh* next, int64_t i, int team, RefreshBuffers& buffers) {
        success[i] = refresh(settings, block, next, team, buffers);
      });
  return success;
}

std::vector<char> cholesky_qr_cpu(const std::vector<Basis>& bases, double noise, int threads) {
  const int64_t count = static_cast<int64_t>(bases.size());
  std::vector<char> success(bases.size(), 0);
  if (omp_in_parallel()) threads = 1;
  const bool whole = one_each(count, threads);
#pragma omp parallel num_threads(threads) if (whole)
  {
    Buffer a, q, gram;
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = bases[i].n;
      for (Buffer* buffer : {&a, &q, &gram}) buffer->resize(static_cast<size_t>(n * n));
      scaled_copy(bases[i].x, n, true, 1.0f, a.data(), n, n, n);
      const float* rows = orthonormal_rows(n, a.data(), q.data(), gram.data(), noise, whole ? 1 : threads, scratch);
      if (rows == nullptr) {
        std::fill(bases[i].q, bases[i].q + n * n, 0.0f);
        continue;
      }
      scaled_copy(rows, n, true, 1.0f, bases[i].q, n, n, n);
      success[i] = 1;
    }
  }
  return success;
}

}  // namespace megatron_opt
