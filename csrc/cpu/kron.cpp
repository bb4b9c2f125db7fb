// The standard headers come before the pragma: their functions are for everyone.
#include "kron.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "teams.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define MOPT_POP 1
#endif

namespace megatron_opt {
namespace {

void damp(const float* m, const float* v, float damping, float* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = m[i] + damping * v[i];
}

void add(const float* a, const float* b, float* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = a[i] + b[i];
}

// a ← factor·(a − b)
void subtract(float* a, const float* b, float factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) a[i] = (a[i] - b[i]) * factor;
}

void divide(float* x, float by, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] /= by;
}

void add_squares(const float* x, float* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] += x[i] * x[i];
}

float largest_of(const float* x, int64_t count) {
  float most = 0.0f;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
  return most;
}

float dot(const float* a, const float* b, int64_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace
}  // namespace megatron_opt

#ifdef MOPT_POP
#pragma GCC pop_options
#endif

namespace megatron_opt {
namespace {

constexpr float kTiny = std::numeric_limits<float>::min();

struct Buffers {
  std::vector<float> damped, between, a, b_transposed, moment_a, moment_b, lower, rows;
  std::vector<float> sums, column, image;
  Scratch scratch;
};

Product<float> product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t m, int64_t n, int64_t k,
                       bool b_transposed, Triangle a_shape, Triangle b_shape) {
  return {a, b, nullptr, c, lda, ldb, 0, n, m, n, k, 1.0f, 0.0f, b_transposed, false, a_shape, b_shape};
}

// x·xᵀ of (n, k), or xᵀ·x of (k, n) with `transposed`.
void moment(const float* x, int64_t n, int64_t k, bool transposed, float* to, int threads, Buffers& at) {
  const int64_t ld = transposed ? n : k;
  const Product<float> p{x, x, nullptr, to, ld, ld, 0, n, n, n, k, 1.0f, 0.0f, !transposed, true};
  transposed ? run_transposed(p, threads, at.scratch, at.rows) : run(p, threads, at.scratch);
}

// Lower bound of ‖A‖₂ of symmetric a (n, n), which is divided by its largest entry: two products with its largest column.
float norm_bound(float* a, int64_t n, Buffers& at) {
  const float largest = largest_of(a, n * n);
  divide(a, std::max(largest, kTiny), n * n);
  at.sums.assign(static_cast<size_t>(n), 0.0f);
  for (int64_t i = 0; i < n; ++i) add_squares(a + i * n, at.sums.data(), n);
  const int64_t index = std::max_element(at.sums.begin(), at.sums.end()) - at.sums.begin();
  at.column.assign(a + index * n, a + (index + 1) * n);
  at.image.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) at.image[i] = dot(a + i * n, at.column.data(), n);
  divide(at.image.data(), std::max(std::sqrt(dot(at.image.data(), at.image.data(), n)), kTiny), n);
  for (int64_t i = 0; i < n; ++i) at.column[i] = dot(a + i * n, at.image.data(), n);
  return largest * std::sqrt(dot(at.column.data(), at.column.data(), n));
}

// Q ← Q − lr·triu(moment_a − moment_b)·Q/‖moment_a + moment_b‖
void update_factor(float* q, int64_t n, float lr, int threads, Buffers& at) {
  float *moment_a = at.moment_a.data(), *moment_b = at.moment_b.data(), *sum = at.lower.data();
  add(moment_a, moment_b, sum, n * n);
  const float step = lr / std::max(norm_bound(sum, n, at), kTiny);
  for (int64_t i = 0; i < n; ++i) {
    std::fill_n(moment_a + i * n, i, 0.0f);
    subtract(moment_a + i * n + i, moment_b + i * n + i, step, n - i);
  }
  Product<float> p = product(moment_a, n, q, n, sum, n, n, n, false, Triangle::upper, Triangle::upper);
  p.d = q;
  p.ldd = n;
  p.alpha = -1.0f;
  p.beta = 1.0f;
  run(p, threads, at.scratch);
  std::copy_n(sum, n * n, q);
}

// out = Q⁻ᵀ·x for upper triangular q (k, k), x (k, n), or (n, k) with `transposed`.
void solve(const float* q, const float* x, int64_t ldx, float* out, int64_t k, int64_t n, bool transposed, int threads, Buffers& at) {
  scaled_copy(q, k, true, 1.0f, at.lower.data(), k, k, k);
  run(Solve{at.lower.data(), x, out, k, ldx, n, k, n, transposed}, threads, at.scratch);
}

void learn(const KronBlock& b, float lr, int threads, Buffers& at) {
  const int64_t rows = b.rows, cols = b.cols, most = std::max(rows, cols);
  for (auto* buffer : {&at.damped, &at.a, &at.b_transposed}) buffer->resize(static_cast<size_t>(rows * cols));
  for (auto* buffer : {&at.moment_a, &at.moment_b, &at.lower}) buffer->resize(static_cast<size_t>(most * most));
  float *x = at.damped.data(), *y = at.between.data();
  for (int64_t i = 0; i < rows; ++i) damp(b.m + i * b.ldm, b.v + i * b.ldv, b.damping, x + i * cols, cols);
  // A = Q₀·x·Q₁ᵀ, and B = Q₀⁻ᵀ·v·Q₁⁻¹ as its transpose
  run(product(b.left, rows, x, cols, y, rows, cols, rows, false, Triangle::upper, Triangle::full), threads, at.scratch);
  run(product(y, cols, b.right, cols, at.a.data(), rows, cols, cols, true, Triangle::full, Triangle::lower), threads, at.scratch);
  solve(b.left, b.v, b.ldv, y, rows, cols, false, threads, at);
  solve(b.right, y, cols, at.b_transposed.data(), cols, rows, true, threads, at);
  moment(at.a.data(), rows, cols, false, at.moment_a.data(), threads, at);
  moment(at.b_transposed.data(), rows, cols, true, at.moment_b.data(), threads, at);
  update_factor(b.left, rows, lr, threads, at);
  moment(at.a.data(), cols, rows, true, at.moment_a.data(), threads, at);
  moment(at.b_transposed.data(), cols, rows, false, at.moment_b.data(), threads, at);
  update_factor(b.right, cols, lr, threads, at);
}

void precondition(const KronBlock& b, const KronBlock* next, int threads, Buffers& at) {
  const int64_t rows = b.rows, cols = b.cols;
  at.damped.resize(static_cast<size_t>(rows * cols));
  float *x = at.damped.data(), *y = at.between.data();
  const KronBlock none{};
  const KronBlock& coming = next != nullptr ? *next : none;
  const Product<float> first = product(b.left, rows, b.m, b.ldm, y, rows, cols, rows, false, Triangle::upper, Triangle::full);
  run(ahead(first, coming.left, rows * rows), threads, at.scratch);
  const Product<float> second = product(b.left, rows, y, cols, x, rows, cols, rows, false, Triangle::lower, Triangle::full);
  run_transposed(ahead(second, coming.right, cols * cols), threads, at.scratch, at.rows);
  const Product<float> third = product(x, cols, b.right, cols, y, rows, cols, cols, true, Triangle::full, Triangle::lower);
  run(ahead(third, coming.m, rows * cols), threads, at.scratch);
  Product<float> last = product(y, cols, b.right, cols, b.m, rows, cols, cols, false, Triangle::full, Triangle::upper);
  last.ldc = b.ldm;
  run(ahead(last, coming.v, rows * cols), threads, at.scratch);
}

}  // namespace

void kron_cpu(float lr, const std::vector<KronBlock>& blocks, int threads) {
  for_blocks<Buffers>(blocks, threads, [&](const KronBlock& b, const KronBlock* next, int64_t, int team, Buffers& at) {
    at.between.resize(static_cast<size_t>(b.rows * b.cols));
    if (b.v != nullptr) learn(b, lr, team, at);
    precondition(b, next, team, at);
  });
}

}  // namespace megatron_opt
