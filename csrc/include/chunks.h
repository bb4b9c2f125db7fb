// Which elements a block works on: tensors are cut into blocks of kBlock elements, numbered through the whole list.
#pragma once

#include "platform.h"

namespace megatron_opt {
inline namespace MOPT_ISA {

constexpr int64_t kBlock = 2048;  // also the block of the 8-bit states

MOPT_HD int64_t blocks_of(int64_t numel) { return (numel + kBlock - 1) / kBlock; }

// The tensor that block `b` belongs to; first[i] is tensor i's first block, first[count] the number of blocks.
template <class Index>
MOPT_HD int locate(const Index* first, int count, int64_t b) {
  int low = 0, high = count;  // first[low] <= b < first[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first[middle] <= b) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace MOPT_ISA
}  // namespace megatron_opt
