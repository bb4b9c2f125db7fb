#include "teams.h"

#include <omp.h>

#include <algorithm>

namespace megatron_opt {
namespace {

constexpr int64_t kDirect = 64 * 64;  // numbers of an operand that are read across their rows

int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// work(first panel, last panel, scratch) over all panels of n columns, for a depth of k.
template <class Work>
void for_panels(int64_t n, int64_t k, int threads, Scratch& scratch, const Work& work) {
  const int64_t panels = panels_of(n);
  const int share = static_cast<int>(std::min<int64_t>(threads, panels));
  if (share == 0) return;
  scratch.resize(std::max<size_t>(scratch.size(), share));
  const size_t needed = static_cast<size_t>(scratch_floats(k));
  for (int t = 0; t < share; ++t) {
    if (scratch[t].size() < needed) scratch[t].resize(needed);
  }
  if (share == 1) return work(0, panels, scratch[0].data());
  // Panels of a triangle get shorter to the right: threads take them in turn.
#pragma omp parallel for num_threads(share) schedule(static, 1)
  for (int64_t j = 0; j < panels; ++j) work(j, j + 1, scratch[omp_get_thread_num()].data());
}

template <class T>
void run_product(const Product<T>& p, int threads, Scratch& scratch) {
  for_panels(p.n, p.k, threads, scratch,
             [&](int64_t first, int64_t last, float* memory) { product_panels(p, first, last, memory); });
  if (p.symmetric) mirror(p.c, p.ldc, p.n);
}

// work(item, team, scratch, memory) for every item: by one thread each, or by all threads one after another.
template <class Work>
void for_items(int64_t count, int threads, const Work& work) {
  if (omp_in_parallel()) threads = 1;
  const bool whole = one_each(count, threads);
#pragma omp parallel num_threads(threads) if (whole)
  {
    Scratch scratch;
    std::vector<float> memory;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) work(i, whole ? 1 : threads, scratch, memory);
  }
}

}  // namespace

void run(const Product<float>& p, int threads, Scratch& scratch) { run_product(p, threads, scratch); }
void run(const Product<uint16_t>& p, int threads, Scratch& scratch) { run_product(p, threads, scratch); }

void run_transposed(Product<float> p, int threads, Scratch& scratch, std::vector<float>& memory) {
  p.a_transposed = p.k * p.lda <= kDirect;
  if (!p.a_transposed) {
    memory.resize(static_cast<size_t>(p.m * p.k));
    scaled_copy(p.a, p.lda, true, 1.0f, memory.data(), p.k, p.m, p.k);
    p.a = memory.data();
    p.lda = p.k;
  }
  run(p, threads, scratch);
}

void run(const Solve& s, int threads, Scratch& scratch) {
  for_panels(s.n, s.k, threads, scratch,
             [&](int64_t first, int64_t last, float* memory) { solve_panels(s, first, last, memory); });
}

void run_products(const std::vector<Product<float>>& products, bool a_transposed, int threads) {
  for_items(static_cast<int64_t>(products.size()), threads, [&](int64_t i, int team, Scratch& scratch, std::vector<float>& rows) {
    if (a_transposed) {
      run_transposed(products[i], team, scratch, rows);
    } else {
      run(products[i], team, scratch);
    }
  });
}

void run_solves(const std::vector<Solve>& solves, bool l_transposed, int threads) {
  for_items(static_cast<int64_t>(solves.size()), threads, [&](int64_t i, int team, Scratch& scratch, std::vector<float>& rows) {
    Solve s = solves[i];
    if (l_transposed) {
      rows.resize(static_cast<size_t>(s.k * s.k));
      scaled_copy(s.l, s.ldl, true, 1.0f, rows.data(), s.k, s.k, s.k);
      s.l = rows.data();
      s.ldl = s.k;
    }
    run(s, team, scratch);
  });
}

}  // namespace megatron_opt
