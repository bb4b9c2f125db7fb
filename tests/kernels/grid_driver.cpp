// Prints the launches of a list of entries as the CUDA code computes them; test_cuda.py works them out again.
// Arguments: multiprocessors, resident blocks, then the entries' sizes. Or `triangle` and a size: the tiles of a symmetric matrix;
// `place` and a number: one tile; `blocks` and pairs of elements and blocks: the launches of Adam-mini.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/include/block_grid.h"
#include "../../csrc/include/grid.h"
#include "../../csrc/include/triangle.h"

using namespace megatron_opt;

int triangle(int64_t n) {
  std::printf("%d %ld\n", kTile, static_cast<long>(triangle_tiles(n)));
  for (int64_t i = 0; i < triangle_tiles(n); ++i) std::printf("%d:%d ", triangle_tile(i).row, triangle_tile(i).column);
  return 0;
}

int blocks_of_entries(int argc, char** argv) {
  std::vector<BlockEntry> entries;
  for (int i = 2; i + 1 < argc; i += 2) {
    entries.push_back({nullptr, nullptr, nullptr, nullptr, std::atoll(argv[i]), std::atoll(argv[i + 1])});
  }
  static BlockBatch batch;
  for (size_t begin = 0; begin < entries.size(); begin += kBlockEntriesPerLaunch) {
    const int64_t blocks = fill(batch, Coefficients{}, entries, begin, std::min(entries.size(), begin + kBlockEntriesPerLaunch));
    for (int64_t block = 0; block < blocks; ++block) {
      const int index = locate(batch.first, batch.count, block);
      std::printf("%d:%ld ", static_cast<int>(begin) + index, static_cast<long>(block - batch.first[index]));
    }
  }
  return 0;
}

int main(int argc, char** argv) {
  if (std::strcmp(argv[1], "triangle") == 0) return triangle(std::atoll(argv[2]));
  if (std::strcmp(argv[1], "blocks") == 0) return blocks_of_entries(argc, argv);
  if (std::strcmp(argv[1], "place") == 0) {
    const TilePlace place = triangle_tile(std::atoll(argv[2]));
    std::printf("%d %d\n", place.row, place.column);
    return 0;
  }
  const int multiprocessors = std::atoi(argv[1]), resident = std::atoi(argv[2]);
  std::vector<TensorEntry> entries;
  for (int i = 3; i < argc; ++i) {
    TensorEntry entry{};
    entry.numel = std::atoll(argv[i]);
    entries.push_back(entry);
  }
  std::printf("%d %d %zu %ld\n", kEntriesPerLaunch, kThreads * kVector, sizeof(Batch), static_cast<long>(total_blocks(entries)));
  const std::vector<int> starts = launches(entries.size());
  static Batch batch;
  int64_t base = 0;
  for (size_t i = 0; i + 1 < starts.size(); ++i) {
    const int64_t blocks = fill(batch, Options{}, entries, starts[i], starts[i + 1], base);
    std::printf("launch %d %d %ld %ld %d\n", batch.base, batch.count, static_cast<long>(batch.base_block),
                static_cast<long>(blocks), grid_size(blocks, multiprocessors, resident));
    for (int64_t block = 0; block < blocks; ++block) {
      const int index = locate(batch.first, batch.count, block);
      std::printf("%d:%ld ", batch.base + index, static_cast<long>((block - batch.first[index]) * kBlock));
    }
    std::printf("\n");
    base += blocks;
  }
  return 0;
}
