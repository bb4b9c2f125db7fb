// Prints the launches of a list of pieces as the CUDA code computes them; test_cuda.py works them out again.
// Arguments: multiprocessors, resident blocks, then the pieces' sizes.
#include <cstdio>
#include <cstdlib>

#include "../../csrc/include/grid.h"

using namespace megatron_opt;

int main(int argc, char** argv) {
  const int multiprocessors = std::atoi(argv[1]), resident = std::atoi(argv[2]);
  std::vector<Piece> pieces;
  for (int i = 3; i < argc; ++i) {
    Piece piece{};
    piece.numel = std::atoll(argv[i]);
    pieces.push_back(piece);
  }
  std::printf("%d %d %zu %ld\n", kPiecesPerLaunch, kThreads * kVector, sizeof(Batch), static_cast<long>(total_blocks(pieces)));
  const std::vector<int> starts = launches(pieces.size());
  static Batch batch;
  int64_t base = 0;
  for (size_t i = 0; i + 1 < starts.size(); ++i) {
    const int64_t blocks = fill(batch, Options{}, pieces, starts[i], starts[i + 1], base);
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
