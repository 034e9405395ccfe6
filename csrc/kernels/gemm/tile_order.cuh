// The order of the tiles of kernels for many rows.
#pragma once

namespace qwen_plugins {

// Where a tile is: bands of `height` row tiles, and column after column in a band, so that the tiles that are computed
// at the same time read few rows of x and few weights, which the L2 cache holds.
struct TilePlace {
  int row_tile, column_tile;

  __device__ __forceinline__ TilePlace(int index, int row_tiles, int column_tiles, int height) {
    const int band = index / (height * column_tiles);
    const int band_height = min(height, row_tiles - band * height);
    const int within = index - band * height * column_tiles;
    row_tile = band * height + within % band_height;
    column_tile = within / band_height;
  }
};

}  // namespace qwen_plugins
