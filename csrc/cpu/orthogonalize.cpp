#include "orthogonalize.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "teams.h"

namespace megatron_opt {
namespace {

int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

// Memory of one thread, or of a team that works on one matrix together.
struct Workspace {
  std::vector<float> memory;
  Scratch scratch;

  template <class T>
  T* take(size_t& at, int64_t count) {
    const size_t floats = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 16;
    T* place = reinterpret_cast<T*>(memory.data() + at);
    std::memset(place, 0, floats * sizeof(float));
    at += floats;
    return place;
  }
};

template <class T>
void iterate(const NewtonSchulz& settings, const Orthogonalization& m, int threads, Workspace& space) {
  const bool tall = m.rows > m.cols;
  const int64_t k = std::min(m.rows, m.cols), wide = std::max(m.rows, m.cols), ld = padded(wide), ldk = padded(k);
  space.memory.resize(static_cast<size_t>(2 * k * ld + 5 * k * ldk + 256));
  size_t at = 0;
  at += (64 - reinterpret_cast<uintptr_t>(space.memory.data()) % 64) % 64 / sizeof(float);
  T* x = space.take<T>(at, k * ld);
  T* y = space.take<T>(at, k * ld);
  T* small[5];
  for (T*& s : small) s = space.take<T>(at, k * ldk);
  const auto square = [&](const T* a, const T* b, const T* d, T* c, float alpha, float beta) {
    run(Product<T>{a, b, d, c, ldk, ldk, ldk, ldk, k, k, k, alpha, beta, true, true}, threads, space.scratch);
  };
  const double norm = std::sqrt(sum_of_squares(m.in, m.rows * m.cols));
  const double scale = 1.0 / (settings.add_eps ? norm + settings.eps : std::max(norm, settings.eps));
  scaled_copy(m.in, m.cols, tall, static_cast<float>(scale), x, ld, k, wide);
  const int steps = static_cast<int>(settings.steps.size());
  for (int start = 0; start < steps; start += settings.gram) {
    const int end = std::min(steps, start + settings.gram);
    T *r = small[0], *z = small[1], *q = small[2], *w = small[3], *next = small[4];
    run(Product<T>{x, x, nullptr, r, ld, ld, 0, ldk, k, k, wide, 1.0f, 0.0f, true, true}, threads, space.scratch);
    for (int i = start; i < end; ++i) {
      const Step& s = settings.steps[i];
      square(r, r, r, z, s.c, s.b);  // z + aI is this step's polynomial; its diagonal term is added where it is applied
      if (i > start) {
        square(z, q, q, next, 1.0f, s.a);
        std::swap(q, next);
      } else if (end - start == 1) {
        std::swap(q, z);
        break;
      } else {
        add_diagonal(z, ldk, k, s.a);
        std::memcpy(q, z, static_cast<size_t>(k * ldk) * sizeof(T));
      }
      if (i + 1 < end) {
        if (i > start) add_diagonal(z, ldk, k, s.a);
        square(z, r, nullptr, w, 1.0f, 0.0f);
        square(w, z, nullptr, r, 1.0f, 0.0f);
      }
    }
    const bool single = end - start == 1;
    const float a = single ? settings.steps[start].a : 0.0f;
    run(Product<T>{q, x, single ? x : nullptr, y, ldk, ld, ld, ld, k, wide, k, 1.0f, a, false, false}, threads,
        space.scratch);
    std::swap(x, y);
  }
  if (tall) {
    scaled_copy(x, ld, true, 1.0f, m.out, k, wide, k);
  } else {
    scaled_copy(x, ld, false, 1.0f, m.out, wide, k, wide);
  }
}

void one(const NewtonSchulz& settings, const Orthogonalization& m, int threads, Workspace& space) {
  if (m.rows == 0 || m.cols == 0) return;
  if (settings.bf16) {
    iterate<uint16_t>(settings, m, threads, space);
  } else {
    iterate<float>(settings, m, threads, space);
  }
}

}  // namespace

void orthogonalize_cpu(const NewtonSchulz& settings, const std::vector<Orthogonalization>& matrices, int threads) {
  const int64_t count = static_cast<int64_t>(matrices.size());
  if (omp_in_parallel()) threads = 1;
  if (threads == 1 || count < 2 * threads) {
    Workspace space;
    for (const Orthogonalization& m : matrices) one(settings, m, threads, space);
    return;
  }
  // The costliest first, so that the last ones to finish are small.
  std::vector<int64_t> order(matrices.size());
  std::iota(order.begin(), order.end(), 0);
  const auto cost = [&](int64_t i) {
    const double rows = static_cast<double>(matrices[i].rows), cols = static_cast<double>(matrices[i].cols);
    return rows * cols * std::min(rows, cols);
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return cost(i) > cost(j); });
#pragma omp parallel num_threads(threads)
  {
    Workspace space;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) one(settings, matrices[order[i]], 1, space);
  }
}

}  // namespace megatron_opt
