// token_depthwise_conv straight from x to the result, without a ring buffer, compiled once per instruction set: 3x3
// convolutions with at most a norm after them and the residual.
//
// A tile is a few neighbouring outputs; for a vector of channels its inputs and sums stay in registers. Tiles iterate
// over the channels first, in memory order, so that cache lines are used whole and the hardware prefetcher follows.
#pragma once

#include "token_depthwise_conv/cpu_block.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// Most output columns of a tile. With stride 1 a tile may have two rows.
constexpr int64_t kTileColumns = kLanes == 16 ? 4 : 2;

// The taps and the shift of each vector of channels, consecutive. The last vector ends with the block; where it
// overlaps the one before, it computes the same results again.
struct TapVectors {
  static constexpr int64_t kEach = 10 * kLanes;
  const float* data;
  int64_t channels;

  FASTVIT_INLINE int64_t next(int64_t c) const {
    return c + kLanes < channels && c + 2 * kLanes > channels ? channels - kLanes : c + kLanes;
  }
};

void pack_taps(const Block& block, const TapVectors& vectors, float* to) {
  for (int64_t c = 0; c < block.channels; c = vectors.next(c), to += TapVectors::kEach) {
    for (int64_t tap = 0; tap < 9; ++tap)
      Vec::load(block.taps + tap * block.op.channel_block + c).store(to + tap * kLanes);
    Vec::load(block.shift + c).store(to + 9 * kLanes);
  }
}

// Neighbouring outputs of one row or two.
template <class T>
struct Tile {
  const T* in;               // the first input inside the map, under row `first_dy` of the taps
  int64_t step, row_step;    // to the next column, and row
  int64_t first_dy, end_dy;  // the rows of taps inside the map, for one output row
  const T* ahead;            // the input in the same column that the next row of tiles starts with; or null
  T* out;
  int64_t out_step, out_row_step;
  bool streams;
};

// Prefetches `columns` tokens of the two input rows that the next row of tiles is the first to read.
template <int64_t columns, class T>
FASTVIT_INLINE void prefetch_inputs(const Tile<T>& tile, int64_t c) {
#pragma GCC unroll 8
  for (int64_t column = 0; column < columns; ++column) {
    __builtin_prefetch(tile.ahead + column * tile.step + c);
    __builtin_prefetch(tile.ahead + column * tile.step + tile.row_step + c);
  }
}

// Prefetches the outputs of the next row of tiles for writing.
template <int64_t rows, int64_t columns, class T>
FASTVIT_INLINE void prefetch_outputs(const Tile<T>& tile, int64_t c) {
#pragma GCC unroll 2
  for (int64_t row = rows; row < 2 * rows; ++row) {
#pragma GCC unroll 4
    for (int64_t column = 0; column < columns; ++column) {
      __builtin_prefetch(tile.out + row * tile.out_row_step + column * tile.out_step + c, 1);
    }
  }
}

// Adds an input row of a tile to the sums of an output row, which has it under row dy of its taps; left, right: its
// first or last column is padding.
template <int64_t columns, int64_t stride, bool left, bool right>
FASTVIT_INLINE void add_row(const Vec* in, const float* taps, int64_t dy, Vec (&sums)[columns]) {
  constexpr int64_t inputs = (columns - 1) * stride + 3;
#pragma GCC unroll 3
  for (int64_t dx = 0; dx < 3; ++dx) {
    const Vec tap = Vec::load(taps + (3 * dy + dx) * kLanes);
#pragma GCC unroll 8
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t i = column * stride + dx;
      if ((left && i == 0) || (right && i == inputs - 1)) continue;
      sums[column] = fma(in[i], tap, sums[column]);
    }
  }
}

// Loads the inputs of a row that are inside the map.
template <int64_t columns, int64_t stride, bool left, bool right, class T>
FASTVIT_INLINE void load_row(const Tile<T>& tile, const T* from, Vec* in) {
  constexpr int64_t inputs = (columns - 1) * stride + 3;
#pragma GCC unroll 16
  for (int64_t i = left; i < inputs - right; ++i) in[i] = Vec::load(from + (i - left) * tile.step);
}

template <int64_t columns>
FASTVIT_INLINE void add_residual(const Vec* in, Vec (&sums)[columns]) {
#pragma GCC unroll 8
  for (int64_t column = 0; column < columns; ++column) sums[column] += in[column + 1];
}

// A tile; left, right: its first or last input column is padding.
template <int64_t rows, int64_t columns, int64_t stride, bool left, bool right, bool residual, class T>
FASTVIT_INLINE void convolve_tile(const TapVectors& vectors, const Tile<T>& given) {
  static_assert(rows == 1 || stride == 1);
  constexpr int64_t inputs = (columns - 1) * stride + 3;
  const Tile<T> tile = given;
  const float* taps = vectors.data;
  for (int64_t c = 0; c < vectors.channels; c = vectors.next(c), taps += TapVectors::kEach) {
    Vec sums[rows][columns], in[inputs];
    for (auto& row : sums) {
      for (Vec& sum : row) sum = Vec::fill(0.0f);
    }
    if (tile.ahead != nullptr) prefetch_inputs<columns * stride>(tile, c);
    if (!(kStreams && tile.streams)) prefetch_outputs<rows, columns>(tile, c);
    const T* from = tile.in + c;
    if constexpr (rows == 1) {
      for (int64_t dy = tile.first_dy; dy < tile.end_dy; ++dy, from += tile.row_step) {
        load_row<columns, stride, left, right>(tile, from, in);
        add_row<columns, stride, left, right>(in, taps, dy, sums[0]);
        if constexpr (residual) {
          if (dy == 1) add_residual(in, sums[0]);
        }
      }
    } else {
#pragma GCC unroll 4
      for (int64_t i = 0; i < rows + 2; ++i, from += tile.row_step) {
        load_row<columns, stride, left, right>(tile, from, in);
#pragma GCC unroll 2
        for (int64_t row = 0; row < rows; ++row) {
          if (i >= row && i < row + 3) add_row<columns, stride, left, right>(in, taps, i - row, sums[row]);
          if (residual && i == row + 1) add_residual(in, sums[row]);
        }
      }
    }
    // Last: beside a large shift the sums would lose their digits.
    const Vec shift = Vec::load(taps + 9 * kLanes);
#pragma GCC unroll 2
    for (int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 4
      for (int64_t column = 0; column < columns; ++column) {
        T* const p = tile.out + row * tile.out_row_step + column * tile.out_step + c;
        store(sums[row][column] + shift, p, kLanes, tile.streams);
      }
    }
  }
}

// The tiles of one output row, or two; `tile` is the first, at the left edge.
template <int64_t rows, int64_t stride, bool residual, class T>
void convolve_tiles(const TokenDepthwiseConvWork& op, const TapVectors& vectors, Tile<T> tile) {
  if (op.width == 1) return convolve_tile<rows, 1, stride, true, true, residual>(vectors, tile);
  convolve_tile<rows, 1, stride, true, false, residual>(vectors, tile);
  const int64_t inner = (op.width - 2) / stride;  // columns with both neighbours, after the first
  int64_t column = -1;                            // of those; the first tile comes before them
  const auto advance = [&](int64_t columns, int64_t inputs) __attribute__((always_inline)) {
    tile.in += inputs * tile.step;
    tile.out += columns * tile.out_step;
    if (tile.ahead != nullptr) tile.ahead += columns * stride * tile.step;
    column += columns;
  };
  advance(1, stride - 1);  // the next tile starts one column left of its first output
  for (; column + kTileColumns <= inner; advance(kTileColumns, kTileColumns * stride)) {
    convolve_tile<rows, kTileColumns, stride, false, false, residual>(vectors, tile);
  }
  if (kTileColumns > 2 && column + 2 <= inner) {
    convolve_tile<rows, 2, stride, false, false, residual>(vectors, tile);
    advance(2, 2 * stride);
  }
  if (column < inner) {
    convolve_tile<rows, 1, stride, false, false, residual>(vectors, tile);
    advance(1, stride);
  }
  if (1 + inner < op.out_width) convolve_tile<rows, 1, stride, false, true, residual>(vectors, tile);
}

// An item of work, at the block's first channel.
template <class T>
struct DirectItem {
  const T* image;      // the first grid token
  T* out;              // the first grid token of the result
  const T* following;  // the `image` of the next item, or null
  int64_t first_row, end_row;
};
template <class T>
using ConvolveDirectly = void (*)(const TokenDepthwiseConvWork&, const TapVectors&, const DirectItem<T>&);

// The output rows of an item.
template <int64_t stride, bool residual, class T>
void convolve_directly(const TokenDepthwiseConvWork& op, const TapVectors& vectors, const DirectItem<T>& item) {
  const int64_t step = op.x_token_stride, row_step = op.width * step;
  for (int64_t y = item.first_row; y < item.end_row;) {
    const int64_t top = y * stride - 1;
    const bool pair = stride == 1 && top >= 0 && y + 1 < item.end_row && top + 4 <= op.height;
    const int64_t bottom = top + (pair ? 4 : 3);
    const T* const below = bottom < op.height ? item.image : item.following;
    const Tile<T> tile{item.image + (top < 0 ? 0 : top) * row_step,
                       step,
                       row_step,
                       top < 0 ? 1 : 0,
                       bottom > op.height ? 2 : 3,
                       below == nullptr ? nullptr : below + bottom % op.height * row_step,
                       item.out + y * op.out_width * op.channels,
                       op.channels,
                       op.out_width * op.channels,
                       op.streams};
    if constexpr (stride == 1) {
      if (pair) convolve_tiles<2, stride, residual>(op, vectors, tile);
    }
    if (!pair) convolve_tiles<1, stride, residual>(op, vectors, tile);
    y += pair ? 2 : 1;
  }
}

template <class T>
ConvolveDirectly<T> choose_convolve_directly(const TokenDepthwiseConvWork& op) {
  return op.stride == 2 ? convolve_directly<2, false, T>
         : op.residual  ? convolve_directly<1, true, T>
                        : convolve_directly<1, false, T>;
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
