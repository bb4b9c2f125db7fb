// Which tiles of a symmetric matrix are computed: those on and below the diagonal, numbered row by row; the others are mirrored.
#pragma once

#include <cmath>

#include "platform.h"

namespace megatron_opt {
inline namespace MOPT_ISA {

constexpr int kTile = 128;  // rows and columns of a tile

struct TilePlace {
  int row, column;  // in tiles; column <= row
};

MOPT_HD int64_t tiles_across(int64_t n) { return (n + kTile - 1) / kTile; }

MOPT_HD int64_t triangle_tiles(int64_t n) { return tiles_across(n) * (tiles_across(n) + 1) / 2; }

// Tile `number` of the triangle: number = row·(row + 1)/2 + column. The root is exact to one for every 32-bit number.
MOPT_HD TilePlace triangle_tile(int64_t number) {
  int64_t row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(number) + 1.0) - 1.0) * 0.5);
  if (row * (row + 1) / 2 > number) --row;
  if ((row + 1) * (row + 2) / 2 <= number) ++row;
  return {static_cast<int>(row), static_cast<int>(number - row * (row + 1) / 2)};
}

}  // namespace MOPT_ISA
}  // namespace megatron_opt
