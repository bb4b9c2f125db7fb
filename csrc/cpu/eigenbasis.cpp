#include "eigenbasis.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

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

void project(const RotatedAdam& settings, const Projection& b, int threads, Buffers& at) {
  const int64_t rows = b.rows, cols = b.cols;
  at.first.resize(static_cast<size_t>(rows * cols));
  at.second.resize(static_cast<size_t>(rows * cols));
  const float* rotated = b.g;
  int64_t ld = b.ldg;
  float *x = at.first.data(), *other = at.second.data();
  if (b.left != nullptr) {
    at.transposed.resize(static_cast<size_t>(rows * rows));
    scaled_copy(b.left, rows, true, 1.0f, at.transposed.data(), rows, rows, rows);
    run(plain(at.transposed.data(), rows, rotated, ld, x, rows, cols, rows, false), threads, at.scratch);
    rotated = x;
    ld = cols;
  }
  if (b.right != nullptr) {
    run(plain(rotated, ld, b.right, cols, other, rows, cols, cols, false), threads, at.scratch);
    std::swap(x, other);
  } else if (b.left == nullptr) {
    scaled_copy(b.g, b.ldg, false, 1.0f, x, cols, rows, cols);
  }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    rotated_adam(settings, x + row * cols, b.m + row * b.ldm, b.v + row * b.ldv, cols);
  }
  float* to = b.right != nullptr ? other : b.u;
  if (b.left != nullptr) {
    run(plain(b.left, rows, x, cols, to, rows, cols, rows, false), threads, at.scratch);
    x = to;
  }
  if (b.right != nullptr) {
    run(plain(x, cols, b.right, cols, b.u, rows, cols, cols, true), threads, at.scratch);
  } else if (b.left == nullptr) {
    std::copy(x, x + rows * cols, b.u);
  }
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

}  // namespace

void project_adam_cpu(const RotatedAdam& settings, const std::vector<Projection>& blocks, int threads) {
  const int64_t count = static_cast<int64_t>(blocks.size());
  if (omp_in_parallel()) threads = 1;
  const bool whole = one_each(count, threads);
#pragma omp parallel num_threads(threads) if (whole)
  {
    Buffers buffers;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) project(settings, blocks[i], whole ? 1 : threads, buffers);
  }
}

std::vector<char> cholesky_qr_cpu(const std::vector<Basis>& bases, double noise, int threads) {
  const int64_t count = static_cast<int64_t>(bases.size());
  std::vector<char> found(bases.size(), 0);
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
      found[i] = 1;
    }
  }
  return found;
}

}  // namespace megatron_opt
