// Launch arithmetic of Adam-mini on CUDA: a launch takes as many tensors as fit into its parameters, a thread block takes whole
// blocks of elements.
#pragma once

#include "grid.h"

namespace megatron_opt {

constexpr int kBlockEntriesPerLaunch = static_cast<int>((4096 - kReserved - sizeof(int64_t)) / (sizeof(BlockEntry) + sizeof(int64_t)));

struct BlockBatch {  // the kernel's parameter
  Coefficients coefficients;
  int count;
  int64_t first[kBlockEntriesPerLaunch + 1];
  BlockEntry entries[kBlockEntriesPerLaunch];
};
static_assert(sizeof(BlockBatch) <= 4096, "a launch's parameters must fit");

// Fills a batch with entries begin … end−1; returns the number of their blocks.
inline int64_t fill(BlockBatch& batch, const Coefficients& c, const std::vector<BlockEntry>& entries, size_t begin, size_t end) {
  batch.coefficients = c;
  batch.count = static_cast<int>(end - begin);
  int64_t blocks = 0;
  for (size_t i = begin; i < end; ++i) {
    batch.first[i - begin] = blocks;
    batch.entries[i - begin] = entries[i];
    blocks += entries[i].numel > 0 ? entries[i].blocks : 0;
  }
  batch.first[end - begin] = blocks;
  return blocks;
}

}  // namespace megatron_opt
