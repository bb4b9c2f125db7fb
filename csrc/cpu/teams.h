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

// The product, asking for contiguous numbers of the next item on the way: products read panels, which no hardware foresees.
inline Product<float> ahead(Product<float> p, const float* wanted, int64_t count) {
  p.ahead = wanted;
  p.ahead_count = wanted == nullptr ? 0 : count;
  return p;
}

constexpr int64_t kPrefetched = 128 * 128;  // numbers of a block whose operands fit into the second cache besides another's

// work(block, the next one, number, team, buffers) for every block: dealt out whole, or one after another by all threads. The next
// one is null where it has another shape or is large.
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
      const Block *block = &blocks[i], *next = i + 1 < count ? block + 1 : nullptr;
      const bool near = next != nullptr && next->rows == block->rows && next->cols == block->cols;
      work(*block, near && next->rows * next->cols <= kPrefetched ? next : nullptr, i, whole ? 1 : threads, buffers);
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
