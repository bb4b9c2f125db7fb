// Launch arithmetic of the CUDA kernels, host code so that it is tested without a GPU. A launch takes as many pieces as fit into
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
constexpr size_t kReserved = 256;  // options and counters beside the pieces
constexpr int kPiecesPerLaunch =
    static_cast<int>((kParameterBytes - kReserved - sizeof(int64_t)) / (sizeof(Piece) + sizeof(int64_t)));

struct Batch {  // the kernel's parameter
  Options options;
  int count;
  int base;             // number of the first piece in the whole list
  int64_t base_block;   // number of its first block in the whole list
  int64_t first[kPiecesPerLaunch + 1];
  Piece pieces[kPiecesPerLaunch];
};
static_assert(sizeof(Batch) <= kParameterBytes, "a launch's parameters must fit");

// Cuts a list into launches: consecutive pieces, the first of each launch and the end.
inline std::vector<int> launches(size_t pieces) {
  std::vector<int> starts;
  for (size_t i = 0; i < pieces; i += kPiecesPerLaunch) starts.push_back(static_cast<int>(i));
  starts.push_back(static_cast<int>(pieces));
  return starts;
}

// Thread blocks of a launch: no more than there is work for, no more than the device holds at once.
inline int grid_size(int64_t blocks, int multiprocessors, int resident_per_multiprocessor) {
  const int64_t resident = static_cast<int64_t>(multiprocessors) * std::max(1, resident_per_multiprocessor);
  return static_cast<int>(std::max<int64_t>(1, std::min(blocks, resident)));
}

// Fills a batch with pieces begin … end−1 of the list; returns the number of blocks it covers.
inline int64_t fill(Batch& batch, const Options& options, const std::vector<Piece>& pieces, int begin, int end,
                    int64_t base_block) {
  batch.options = options;
  batch.count = end - begin;
  batch.base = begin;
  batch.base_block = base_block;
  int64_t blocks = 0;
  for (int i = begin; i < end; ++i) {
    batch.first[i - begin] = blocks;
    batch.pieces[i - begin] = pieces[i];
    blocks += blocks_of(pieces[i].numel);
  }
  batch.first[end - begin] = blocks;
  return blocks;
}

inline int64_t total_blocks(const std::vector<Piece>& pieces) {
  int64_t blocks = 0;
  for (const Piece& piece : pieces) blocks += blocks_of(piece.numel);
  return blocks;
}

}  // namespace megatron_opt
