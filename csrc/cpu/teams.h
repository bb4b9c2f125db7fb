// How threads share products and solves: many of them are dealt out whole, few are cut into panels.
#pragma once

#include <vector>

#include "factor.h"
#include "product.h"

namespace megatron_opt {

using Scratch = std::vector<std::vector<float>>;  // by thread

// Whether `count` equal items are dealt out whole.
inline bool one_each(int64_t count, int threads) {
  return threads > 1 && (count >= 2 * threads || (count > 0 && count % threads == 0));
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
