// Launch arithmetic of the CUDA kernels, host code so that it is tested without a GPU. A launch takes as many entries as fit into
// the kernel's parameters; its thread blocks stride over the blocks of all of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "chunks.h"
#include "launch.h"

namespace megatron_opt {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // elements a thread handles: 16 bytes of bf16, 2 × 16 bytes of fp32
static_assert(kThreads * kVector == kBlock, "one thread block covers one block of elements");

#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr size_t kParameterBytes = 4096;  // what a kernel may be given, before CUDA 12.1
#else
constexpr size_t kParameterBytes = 32764;
#endif
constexpr size_t kReserved = 256;  // options and counters beside the entries
constexpr int kEntriesPerLaunch =
    static_cast<int>((kParameterBytes - kReserved - sizeof(int64_t)) / (sizeof(TensorEntry) + sizeof(int64_t)));

struct Batch {  // the kernel's parameter
  Options options;
  int count;
  int base;             // number of the first entry in the whole list
  int64_t base_block;   // number of its first block in the whole list
  int64_t first[kEntriesPerLaunch + 1];
  TensorEntry entries[kEntriesPerLaunch];
};
static_assert(sizeof(Batch) <= kParameterBytes, "a launch's parameters must fit");

// Cuts a list into launches: consecutive entries, the first of each launch and the end.
inline std::vector<int> launches(size_t entries) {
  std::vector<int> starts;
  for (size_t i = 0; i < entries; i += kEntriesPerLaunch) starts.push_back(static_cast<int>(i));
  starts.push_back(static_cast<int>(entries));
  return starts;
}

// Thread blocks of a launch: no more than there is work for, no more than the device holds at once.
inline int grid_size(int64_t blocks, int multiprocessors, int resident_per_multiprocessor) {
  const int64_t resident = static_cast<int64_t>(multiprocessors) * std::max(1, resident_per_multiprocessor);
  return static_cast<int>(std::max<int64_t>(1, std::min(blocks, resident)));
}

// Fills a batch with entries begin … end−1 of the list; returns the number of blocks it covers.
inline int64_t fill(Batch& batch, const Options& options, const std::vector<TensorEntry>& entries, int begin, int end,
                    int64_t base_block) {
  batch.options = options;
  batch.count = end - begin;
  batch.base = begin;
  batch.base_block = base_block;
  int64_t blocks = 0;
  for (int i = begin; i < end; ++i) {
    batch.first[i - begin] = blocks;
    batch.entries[i - begin] = entries[i];
    blocks += blocks_of(entries[i].numel);
  }
  batch.first[end - begin] = blocks;
  return blocks;
}

inline int64_t total_blocks(const std::vector<TensorEntry>& entries) {
  int64_t blocks = 0;
  for (const TensorEntry& entry : entries) blocks += blocks_of(entry.numel);
  return blocks;
}

}  // namespace megatron_opt
