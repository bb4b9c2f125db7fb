// How threads share products and solves: many of them are dealt out whole, few are cut into panels.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "factor.h"
#include "product.h"

namespace megatron_opt {

using Scratch = std::vector<std::vector<float>>;  // by thread

// Whether `count` equal items are dealt out whole.
inline bool one_each(int64_t count, int threads) {
  return threads > 1 && (count >= 2 * threads || (count > 0 && count % threads == 0));
}

// Asks for numbers that the next item needs, row by row: products read panels, which no hardware foresees.
inline void prefetch(const float* x, int64_t ld, int64_t rows, int64_t cols) {
  if (x == nullptr) return;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; j += 16) __builtin_prefetch(x + i * ld + j, 0, 2);
  }
}

constexpr int64_t kPrefetched = 128 * 128;  // numbers of a block whose operands fit into the second cache besides another's

// work(block, the thread's next one or null, team, buffers) for every block: dealt out whole, or one after another by all threads.
template <class Buffers, class Block, class Work>
void for_blocks(const std::vector<Block>& blocks, int threads, const Work& work) {
  const int64_t count = static_cast<int64_t>(blocks.size());
  if (omp_in_parallel()) threads = 1;
  const bool whole = one_each(count, threads);
  const int64_t run = whole ? std::clamp<int64_t>(count / (4 * threads), 1, 16) : 1;
#pragma omp parallel num_threads(threads) if (whole)
  {
    Buffers buffers;
#pragma omp for schedule(dynamic, run)
    for (int64_t i = 0; i < count; ++i) {
      const bool ahead = i + 1 < count && blocks[i + 1].rows * blocks[i + 1].cols <= kPrefetched;
      work(i, ahead ? &blocks[i + 1] : nullptr, whole ? 1 : threads, buffers);
    }
  }
}

// One product or solve by a team of threads; the result does not depend on their number.
void run(const Product<float>& p, int threads, Scratch& scratch);
void run(const Product<uint16_t>& p, int threads, Scratch& scratch);
void run(const Solve& s, int threads, Scratch& scratch);

// The same with A stored (k, m); `memory` takes a copy where A is large.
void run_transposed(Product<float> p, int threads, Scratch& scratch, std::vector<float>& memory);

// C of every product; threads share products out, or the panels of each where there are few. With `a_transposed` A is
// stored (k, m).
void run_products(const std::vector<Product<float>>& products, bool a_transposed, int threads);

// out of every solve; with `l_transposed` L is stored upper triangular, its transpose.
void run_solves(const std::vector<Solve>& solves, bool l_transposed, int threads);

}  // namespace megatron_opt
