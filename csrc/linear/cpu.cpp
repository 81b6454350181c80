// A linear layer with what stands before and behind it, compiled once per instruction set.
//
// Columns are the lanes of every vector. A tile of the result is kRows rows by a panel of kPanelVectors vectors; its
// sums stay in registers while words of x are broadcast and multiplied by the packed weight:
//   sums[r][c] += x[r][k] * weight[k][c]
// Every kDepthBlock terms the sums are added to the tile's totals, which start with the bias: partial sums keep the
// rounding error of long sums small.
//
// Rows of x are copied to a block in the L2 cache, normalised on the way. kDepthBlock words of a panel pass all tiles
// of the block while they are in the L1 cache, and the next ones are prefetched. In a block a row is cut into parts of
// kDepthBlock words, [part][row][kRowStride]: a constant distance between rows fits the addressing modes, and is no
// power of two, at which rows would share cache sets.
//
// Rows may be windows of maps, which are copied to the block run by run, or columns of a matrix.
//
// With the bfloat16 dot product (kPairs) a word is a pair along the depth, and the sums are float32.
#include "linear/args.h"

#include <type_traits>

#include "common/vec_activation.h"
#include "common/vec_product.h"
#include "common/vec_transpose.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int kPanelVectors = 2;
constexpr int64_t kPanel = kPanelVectors * kLanes;
constexpr int kRows = Vec::lanes == 16 ? 14 : 6;  // as many sums as the registers hold beside the operands
// Terms of a partial sum: of so many words a panel, 24 KB, and a tile's rows fit the L1 cache.
constexpr int64_t kDepthBlock = Vec::lanes == 16 ? 192 : 384;
constexpr int64_t kRowStride = kDepthBlock + 16;
// The most rows of a block that is deeper than kDepthBlock, whose totals wait for its later parts.
constexpr int64_t kMostRows = kBlockFloats / kDepthBlock + 2 * kRows;
constexpr int kLine = 16;  // floats of a cache line

// --- Words: floats, or pairs of bfloat16 -----------------------------------------------------------------------------

// Copies `count` words from element `first` of a contiguous row of `depth` elements; the last pair's missing half is
// zero.
template <class T>
inline void copy_words(const T* row, int64_t depth, int64_t first, int64_t count, float* to) {
  if constexpr (kPairs) {
    const int64_t left = depth - first;
    const int64_t whole = smaller(count, left / 2);
    memcpy(to, row + first, static_cast<size_t>(whole) * sizeof(float));
    if (whole < count) {
      const uint32_t bits = row[depth - 1].bits;
      memcpy(to + whole, &bits, sizeof bits);
    }
  } else if constexpr (sizeof(T) == sizeof(float)) {
    memcpy(to, row + first, static_cast<size_t>(count) * sizeof(float));
  } else {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) Vec::load(row + first + k).store(to + k);
    for (; k < count; ++k) to[k] = widen(row[first + k]);
  }
}

// --- The packed weight: [panel][word of the depth][column] -----------------------------------------------------------

constexpr int64_t kWordsAhead = 2 * kLanes;  // of each row: too many rows for the hardware prefetcher

// Packs a panel whose columns are contiguous rows of the weight.
template <class T>
void pack_rows(const LinearParams& p, int64_t column, int64_t columns, float* to) {
  constexpr bool kInPlace = kPairs || sizeof(T) == sizeof(float);  // a row's elements already are words
  constexpr int64_t kElements = kPairs ? 2 : 1;
  const int64_t words = words_of(p.depth), whole = kInPlace ? p.depth / kElements : 0;
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    const T* weight = static_cast<const T*>(p.weight) + (column + c) * p.weight_column_stride;
    for (int64_t k = 0; k < words; k += kLanes) {
      float buffer[kLanes][kLanes] = {};
      const float* rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const T* row = weight + i * p.weight_column_stride;
        __builtin_prefetch(row + (k + kWordsAhead) * kElements);
        if (c + i < columns && k + kLanes <= whole) {
          rows[i] = reinterpret_cast<const float*>(row + k * kElements);
          continue;
        }
        rows[i] = buffer[i];
        if (c + i < columns) copy_words(row, p.depth, k * kElements, smaller(kLanes, words - k), buffer[i]);
      }
      if (k + kLanes <= words) {
        transpose_square(rows, to + k * kPanel + c, kPanel);
      } else {
        float square[kLanes * kLanes];
        transpose_square(rows, square, kLanes);
        for (int64_t i = 0; k + i < words; ++i) Vec::load(square + i * kLanes).store(to + (k + i) * kPanel + c);
      }
    }
  }
}

// Packs a panel of a weight whose columns are adjacent.
template <class T>
void pack_columns(const LinearParams& p, int64_t column, int64_t columns, float* to) {
  const T* weight = static_cast<const T*>(p.weight) + column;
  for (int64_t k = 0; k < words_of(p.depth); ++k, to += kPanel) {
    if constexpr (kPairs) {
      const T* low = weight + 2 * k * p.weight_depth_stride;
      const T* high = low + p.weight_depth_stride;
      for (int64_t c = 0; c < kPanel; ++c) {
        const uint32_t second = c < columns && 2 * k + 1 < p.depth ? high[c].bits : 0;
        const uint32_t bits = (c < columns ? low[c].bits : 0) | second << 16;
        memcpy(to + c, &bits, sizeof bits);
      }
    } else {
      const T* row = weight + k * p.weight_depth_stride;
      for (int64_t c = 0; c < kPanel; ++c) to[c] = c < columns ? widen(row[c]) : 0.0f;
    }
  }
}

template <class T>
void pack(const LinearParams& p, int64_t begin, int64_t end, float* packed) {
  const int64_t words = words_of(p.depth);
  for (int64_t panel = begin; panel < end; ++panel, packed += words * kPanel) {
    const int64_t column = panel * kPanel, columns = smaller(kPanel, p.columns - column);
    if (p.weight_depth_stride == 1) {
      pack_rows<T>(p, column, columns, packed);
    } else {
      pack_columns<T>(p, column, columns, packed);
    }
  }
}

// --- A block of rows -------------------------------------------------------------------------------------------------

using Word = std::conditional_t<kPairs, bf16, float>;  // an element of a block
constexpr int64_t kElementsOfWord = kPairs ? 2 : 1;

// Mean and 1 / sqrt(variance + eps) of a row. rest: of the mean, lost in rounding, which a sum of deviations would have
// once for every element.
struct Moments {
  float mean, rest, inverse;
};

// row(k): a pointer to element k, with the next kLanes beside it where k is a multiple of that.
template <class Row>
Moments moments(const Row& row, int64_t depth, float eps) {
  if (depth == 0) return {};
  // The mean as what is to be added to the first element: exact for a row of equal values, whose deviation is 0.
  const float first = widen(*row(0));
  Vec sums[2] = {Vec::fill(0.0f), Vec::fill(0.0f)};
  const int64_t whole = depth / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) sums[k / kLanes % 2] += Vec::load(row(k)) - Vec::fill(first);
  float total = sum(sums[0] + sums[1]);
  for (int64_t k = whole; k < depth; ++k) total += widen(*row(k)) - first;
  const float mean = first + total / static_cast<float>(depth);
  Vec squares[2] = {Vec::fill(0.0f), Vec::fill(0.0f)};
  sums[0] = sums[1] = Vec::fill(0.0f);
  for (int64_t k = 0; k < whole; k += kLanes) {
    const int64_t i = k / kLanes % 2;
    const Vec apart = Vec::load(row(k)) - Vec::fill(mean);
    sums[i] += apart;
    squares[i] = fma(apart, apart, squares[i]);
  }
  float rest = sum(sums[0] + sums[1]), variance = sum(squares[0] + squares[1]);
  for (int64_t k = whole; k < depth; ++k) {
    const float apart = widen(*row(k)) - mean;
    rest += apart, variance += apart * apart;
  }
  rest /= static_cast<float>(depth), variance /= static_cast<float>(depth);
  return {mean, rest, 1.0f / __builtin_sqrtf(variance + eps)};
}

// to = (from - mean - rest) * inverse * weight + bias, for `count` elements of a row, `first` and the following.
template <class T, class To>
void normalize(const LinearParams& p, const T* from, Moments of, int64_t first, int64_t count, To* to) {
  for (int64_t k = 0; k < count; k += kLanes) {
    const int64_t n = smaller(kLanes, count - k), at = first + k;
    Vec value = (load(from + k, n) - Vec::fill(of.mean) - Vec::fill(of.rest)) * Vec::fill(of.inverse);
    if (p.norm_weight != nullptr) value *= load(p.norm_weight + at, n);
    if (p.norm_bias != nullptr) value += load(p.norm_bias + at, n);
    store(round_to<T>(value), to + k, n);
  }
}

constexpr int64_t kPart = kDepthBlock * kElementsOfWord;  // elements of a part of a row

// Element k of row r.
FASTVIT_INLINE Word* element_of(const RowBlock& block, int64_t r, int64_t k) {
  static_assert(kPart % kPanel == 0);
  float* part = block.data + (k / kPart * block.block_rows + r) * kRowStride;
  return reinterpret_cast<Word*>(part) + k % kPart;
}

// Copies `count` elements to words of each of `rows` rows of a block; those of the next are `step` further in x. Few
// elements are two copies of a fixed size, which overlap.
template <int kBytes>
FASTVIT_INLINE void copy_ends(const void* from, int64_t bytes, void* to) {
  char first[kBytes], last[kBytes];
  memcpy(first, from, kBytes);
  memcpy(last, static_cast<const char*>(from) + bytes - kBytes, kBytes);
  memcpy(to, first, kBytes);
  memcpy(static_cast<char*>(to) + bytes - kBytes, last, kBytes);
}

template <class T, class W>
FASTVIT_INLINE void copy_runs(const T* from, int64_t step, int64_t count, int64_t rows, W* to) {
  constexpr int64_t kNext = kRowStride * static_cast<int64_t>(sizeof(float) / sizeof(W));
  if constexpr (sizeof(T) == sizeof(W)) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes >= 16 && bytes <= 32) {
      for (int64_t r = 0; r < rows; ++r, from += step, to += kNext) copy_ends<16>(from, bytes, to);
    } else if (bytes >= 8 && bytes < 16) {
      for (int64_t r = 0; r < rows; ++r, from += step, to += kNext) copy_ends<8>(from, bytes, to);
    } else {
      for (int64_t r = 0; r < rows; ++r, from += step, to += kNext) memcpy(to, from, static_cast<size_t>(bytes));
    }
  } else {
    for (int64_t r = 0; r < rows; ++r, from += step, to += kNext) {
      int64_t k = 0;
      for (; k + kLanes <= count; k += kLanes) Vec::load(from + k).store(to + k);
      for (; k < count; ++k) to[k] = widen(from[k]);
    }
  }
}

// The windows that lie beside each other in one row of their grid, as rows of a block.
template <class T>
struct WindowsOfRow {
  const LinearParams& p;
  const RowBlock& block;
  int64_t r, column, count;  // the first row of the block, the first window's column, how many

  // Elements [first, first + n) of a run, which are elements k and the following of the rows; `row` of the map, or
  // null.
  FASTVIT_INLINE void put(const T* row, int64_t first, int64_t n, int64_t k) const {
    while (n > 0) {
      const int64_t fits = smaller(n, kPart - k % kPart);
      put_in_part(row, first, fits, element_of(block, r, k));
      first += fits, k += fits, n -= fits;
    }
  }

 private:
  static constexpr int64_t kNext = kRowStride * kElementsOfWord;

  FASTVIT_INLINE void put_in_part(const T* row, int64_t first, int64_t n, Word* to) const {
    const Windows& w = *p.windows;
    const int64_t step = w.stride_width * w.pixel, size = w.width * w.pixel;
    int64_t at = (column * w.stride_width - w.padding_width) * w.pixel + first;  // in the map's row, may be beyond
    for (int64_t i = 0; i < count;) {
      if (row != nullptr && at >= 0 && at + n <= size) {
        const int64_t inside = smaller(count - i, (size - n - at) / step + 1);
        copy_runs(row + at, step, n, inside, to);
        i += inside, at += inside * step, to += inside * kNext;
        continue;
      }
      const int64_t begin = row == nullptr ? n : smaller(n, larger(0, -at));
      const int64_t end = row == nullptr ? n : larger(begin, smaller(n, size - at));
      memset(to, 0, static_cast<size_t>(begin) * sizeof *to);
      if (begin < end) copy_runs(row + at + begin, 0, end - begin, 1, to + begin);
      memset(to + end, 0, static_cast<size_t>(n - end) * sizeof *to);
      ++i, at += step, to += kNext;
    }
  }
};

template <class T>
void load_windows(const LinearParams& p, int64_t row, const RowBlock& block) {
  const Windows& w = *p.windows;
  const int64_t run = w.kernel_width * w.pixel, last = p.first + p.depth;
  for (int64_t r = 0; r < block.rows;) {
    const int64_t grid_row = (row + r) / w.columns, column = (row + r) % w.columns;
    const int64_t count = smaller(block.rows - r, w.columns - column);
    const T* map = static_cast<const T*>(p.x) + grid_row / w.rows * w.map_stride;
    const int64_t top = grid_row % w.rows * w.stride_height - w.padding_height;
    const WindowsOfRow<T> windows{p, block, r, column, count};
    for (int64_t k = p.first; k < last;) {
      const int64_t index = k / run, first = k % run, n = smaller(run - first, last - k);
      const int64_t y = top + index % w.kernel_height;
      const T* from = nullptr;
      if (y >= 0 && y < w.height) from = map + index / w.kernel_height * w.plane_stride + y * w.row_stride;
      windows.put(from, first, n, k - p.first);
      k += n;
    }
    if (kPairs && p.depth % 2 != 0) {  // the missing half of a pair
      for (int64_t i = 0; i < count; ++i) memset(element_of(block, r + i, p.depth), 0, sizeof(Word));
    }
    r += count;
  }
}

template <class T>
void load_rows(const LinearParams& p, int64_t row, const RowBlock& block) {
  constexpr int64_t kElements = kElementsOfWord;
  const int64_t words = words_of(p.depth);
  for (int64_t r = 0; r < block.rows; ++r) {
    const T* from = static_cast<const T*>(p.x) + (row + r) * p.x_stride;
    const Moments of = p.has_norm ? moments([from](int64_t k) { return from + k; }, p.depth, p.norm_eps) : Moments{};
    for (int64_t first = 0; first < words; first += kDepthBlock) {
      float* to = block.data + (first / kDepthBlock * block.block_rows + r) * kRowStride;
      const int64_t count = smaller(kDepthBlock, words - first);
      if (!p.has_norm) {
        copy_words(from, p.depth, first * kElements, count, to);
        continue;
      }
      const int64_t elements = smaller(count * kElements, p.depth - first * kElements);
      if (elements < count * kElements) to[count - 1] = 0.0f;  // the missing half of a pair
      normalize(p, from + first * kElements, of, first * kElements, elements, reinterpret_cast<Word*>(to));
    }
  }
}

// Rows whose elements are not adjacent, but those of neighbouring rows are: a gradient's, seen from its columns.
template <class T>
void load_columns(const LinearParams& p, int64_t row, const RowBlock& block) {
  const int64_t words = words_of(p.depth), stride = p.x_depth_stride;
  for (int64_t first = 0; first < words; first += kLanes) {
    float* to = block.data + first / kDepthBlock * block.block_rows * kRowStride + first % kDepthBlock;
    for (int64_t r = 0; r < block.rows; r += kLanes) {
      const int64_t count = smaller(kLanes, block.rows - r);
      float buffer[kLanes][kLanes] = {};
      const float* lines[kLanes];  // a word of each of the rows
      for (int64_t i = 0; i < kLanes; ++i) {
        lines[i] = buffer[i];
        if (first + i >= words) continue;
        const T* from = static_cast<const T*>(p.x) + (first + i) * kElementsOfWord * stride + row + r;
        if constexpr (kPairs) {
          const bool whole = 2 * (first + i) + 1 < p.depth;
          for (int64_t c = 0; c < count; ++c) {
            const uint32_t bits = from[c].bits | (whole ? static_cast<uint32_t>(from[stride + c].bits) << 16 : 0);
            memcpy(buffer[i] + c, &bits, sizeof bits);
          }
        } else if (sizeof(T) == sizeof(float) && count == kLanes) {
          lines[i] = reinterpret_cast<const float*>(from);
        } else {
          load(from, count).store(buffer[i]);
        }
      }
      if (count == kLanes) {
        transpose_square(lines, to + r * kRowStride, kRowStride);
        continue;
      }
      float square[kLanes * kLanes];
      transpose_square(lines, square, kLanes);
      for (int64_t i = 0; i < count; ++i) Vec::load(square + i * kLanes).store(to + (r + i) * kRowStride);
    }
  }
}

void normalize_rows(const LinearParams& p, const RowBlock& block) {
  for (int64_t r = 0; r < block.rows; ++r) {
    const auto row = [&](int64_t k) { return element_of(block, r, k); };
    const Moments of = moments(row, p.depth, p.norm_eps);
    for (int64_t k = 0; k < p.depth; k += kPart) {
      normalize(p, row(k), of, k, smaller(kPart, p.depth - k), row(k));
    }
  }
}

// --- A tile ----------------------------------------------------------------------------------------------------------

// totals[r][c] = before[r][c] + sum_k x[r][k] weight[k][c] over `words` words, where rows of `before` are
// `before_stride` apart. With every cache line of a row, `lines` of them are prefetched to the L2 cache from `next` on.
template <int kR>
FASTVIT_NOINLINE void add_products(int64_t words, const float* x, const float* weight, const float* before,
                                   int64_t before_stride, float* totals, const float* next, int64_t lines) {
  Vec sums[kR][kPanelVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kPanelVectors; ++c) sums[r][c] = Vec::fill(0.0f);
  }
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    Vec columns[kPanelVectors];
#pragma GCC unroll 2
    for (int c = 0; c < kPanelVectors; ++c) columns[c] = Vec::load(weight + k * kPanel + c * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const Broadcast row = broadcast(x[r * kRowStride + k]);
#pragma GCC unroll 2
      for (int c = 0; c < kPanelVectors; ++c) sums[r][c] = multiply_add(row, columns[c], sums[r][c]);
    }
  };
  int64_t k = 0;
  while (k + kLine <= words) {
    for (int64_t i = 0; i < lines; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
    if constexpr (kR >= kRows / 2) {
#pragma GCC unroll 16
      for (int i = 0; i < kLine; ++i) step(k + i);
    } else {  // which are few: less code, that compiles sooner
#pragma GCC unroll 4
      for (int i = 0; i < kLine; ++i) step(k + i);
    }
    k += kLine;
  }
  for (; k < words; ++k) step(k);
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kPanelVectors; ++c) {
      (Vec::load(before + r * before_stride + c * kLanes) + sums[r][c]).store(totals + r * kPanel + c * kLanes);
    }
  }
}

// A panel of the weight against the rows of a block.
struct Panel {
  const LinearParams& p;
  int64_t row;  // of the block's first in out
  const RowBlock& block;
  int64_t column, columns;  // columns: at most kPanel
  const float *packed, *next_packed;
  const RowBlock* next = nullptr;  // the block that the result is for, if it is for one
  float* gates = nullptr;          // [row][column], of a product with them

  // finish(panel, r, n, totals) for every tile of n rows from r on. A pointer: this is much code, for many of them.
  using Finish = void (*)(const Panel&, int64_t r, int64_t n, const float* totals);
  void run(Finish finish) const;

 private:
  // The totals of a tile from the result so far.
  void load_result(int64_t r, int64_t n, float* totals) const {
    for (int64_t i = 0; i < n; ++i, totals += kPanel) {
      const float* from = static_cast<const float*>(p.out) + (row + r + i) * p.columns + column;
      for (int64_t c = 0; c < columns; c += kLanes) load(from + c, smaller(kLanes, columns - c)).store(totals + c);
    }
  }
};

void Panel::run(Finish finish) const {
  alignas(64) float totals_of_rows[kMostRows * kPanel], bias[kPanel];
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    (c < columns ? load(p.bias + column + c, smaller(kLanes, columns - c)) : Vec::fill(0.0f)).store(bias + c);
  }
  const int64_t rows = block.rows, words = words_of(p.depth), lines = smaller(kPanel, divide_up(kPanel * kRows, rows));
  for (int64_t first = 0; first == 0 || first < words; first += kDepthBlock) {
    const int64_t count = smaller(kDepthBlock, words - first);
    const bool last = first + count == words;
    // Each tile prefetches its share of the part of the weight that follows. Beyond the weight that is harmless.
    const float* ahead = last ? next_packed : packed + (first + count) * kPanel;
    for (int64_t r = 0; r < rows;) {
      // Whole tiles, except that the last two may share the rest evenly: a tile of few rows waits on latency.
      const int64_t left = rows - r;
      const int64_t n = left > kRows && left < kRows + kRows / 2 ? left / 2 : smaller(kRows, left);
      float* totals = totals_of_rows + (first == 0 && last ? 0 : r * kPanel);
      const float* before = totals;
      if (first == 0 && !p.accumulate) {
        before = bias;
      } else if (first == 0) {
        load_result(r, n, totals);
      }
      const float* x = block.data + (first / kDepthBlock * block.block_rows + r) * kRowStride;
      with_constant<kRows>(n, [&](auto height) {
        add_products<height.value>(count, x, packed + first * kPanel, before, before == bias ? 0 : kPanel, totals,
                                   ahead, lines);
      });
      ahead += count / kLine * lines * kLine;
      if (last) finish(*this, r, n, totals);
      r += n;
    }
  }
}

// f(panel) for panels [begin, end).
template <class F>
FASTVIT_INLINE void for_each_panel(const LinearParams& p, int64_t row, const RowBlock& block, int64_t begin,
                                   int64_t end, const float* packed, const F& f) {
  for (int64_t panel = begin; panel < end; ++panel, packed += p.panel_stride) {
    const int64_t column = panel * kPanel, columns = smaller(kPanel, p.columns - column);
    f(Panel{p, row, block, column, columns, packed, packed + p.panel_stride});
  }
}

// --- What becomes of a tile's totals ---------------------------------------------------------------------------------

// The activation of a product, each rounded to float16 where that is T: a result beyond its range is infinite before
// anything makes it smaller.
template <Activation activation, class T, bool kGate = false>
FASTVIT_INLINE void activate_rounded(Activation given, Vec (&values)[kPanelVectors]) {
#pragma GCC unroll 2
  for (Vec& value : values) value = round_to<T>(value);
  activate<activation, T, kGate>(given, values);
  if constexpr (activation != Activation::none) {
#pragma GCC unroll 2
    for (Vec& value : values) value = round_to<T>(value);
  }
}

// To out.
template <class T, Activation activation>
void finish_output(const Panel& panel, int64_t r, int64_t n, const float* totals) {
  const LinearParams& p = panel.p;
  // Copies, since a vector that is stored might change what a reference refers to.
  const int64_t stride = p.columns, residual_stride = p.residual_stride, columns = panel.columns;
  const Activation given = p.activation;
  const float* scale = p.scale == nullptr ? nullptr : p.scale + panel.column;
  T* out = static_cast<T*>(p.out) + (panel.row + r) * stride + panel.column;
  const T* residual = p.residual == nullptr
                          ? nullptr
                          : static_cast<const T*>(p.residual) + (panel.row + r) * residual_stride + panel.column;
  const float* factor = p.column_factor == nullptr ? nullptr : p.column_factor + panel.column;
  const float* shift = p.column_shift + (factor == nullptr ? 0 : panel.column);
  for (int64_t i = 0; i < n; ++i, totals += kPanel, out += stride) {
    Vec values[kPanelVectors] = {Vec::load(totals), Vec::load(totals + kLanes)};
    if (factor != nullptr) {
#pragma GCC unroll 2
      for (int c = 0; c < kPanelVectors; ++c) {
        const int64_t m = smaller(kLanes, columns - c * kLanes);
        if (m <= 0) break;
        values[c] = fma(values[c], load(factor + c * kLanes, m), load(shift + c * kLanes, m));
      }
    }
    activate_rounded<activation, T>(given, values);
    if (columns == kPanel) {
#pragma GCC unroll 2
      for (int c = 0; c < kPanelVectors; ++c) {
        if (scale != nullptr) values[c] = round_to<T>(values[c] * Vec::load(scale + c * kLanes));
        if (residual != nullptr) values[c] += Vec::load(residual + c * kLanes);
      }
      store_two(values[0], values[1], out);
    } else {
#pragma GCC unroll 2
      for (int c = 0; c < kPanelVectors; ++c) {
        const int64_t m = smaller(kLanes, columns - c * kLanes);
        if (m <= 0) break;
        if (scale != nullptr) values[c] = round_to<T>(values[c] * load(scale + c * kLanes, m));
        if (residual != nullptr) values[c] += load(residual + c * kLanes, m);
        store(values[c], out + c * kLanes, m);
      }
    }
    if (residual != nullptr) residual += residual_stride;
  }
}

// Stores the first `columns` values of a panel in a row of a block.
FASTVIT_INLINE void store_panel(const Vec (&values)[kPanelVectors], int64_t columns, Word* to) {
  if (columns == kPanel) return store_two(values[0], values[1], to);
  memset(to, 0, kPanel * sizeof(Word));  // the missing half of a pair
#pragma GCC unroll 2
  for (int c = 0; c < kPanelVectors; ++c) {
    const int64_t m = smaller(kLanes, columns - c * kLanes);
    if (m <= 0) break;
    store(values[c], to + c * kLanes, m);
  }
}

// To the block that the next product reads.
template <class T, Activation activation>
void finish_to_block(const Panel& panel, int64_t r, int64_t n, const float* totals) {
  const int64_t columns = panel.columns;
  const Activation given = panel.p.activation;
  Word* to = element_of(*panel.next, r, panel.column);
  for (int64_t i = 0; i < n; ++i, totals += kPanel, to += kRowStride * kElementsOfWord) {
    Vec values[kPanelVectors] = {Vec::load(totals), Vec::load(totals + kLanes)};
    activate_rounded<activation, T>(given, values);
    store_panel(values, columns, to);
  }
}

// To the panel of gates.
template <class T, Activation activation>
void finish_gates(const Panel& panel, int64_t r, int64_t n, const float* totals) {
  const Activation given = panel.p.activation;
  float* to = panel.gates + r * kPanel;
  for (int64_t i = 0; i < n; ++i, totals += kPanel, to += kPanel) {
    Vec values[kPanelVectors] = {Vec::load(totals), Vec::load(totals + kLanes)};
    activate_rounded<activation, T, true>(given, values);
    store_two(values[0], values[1], to);
  }
}

// To a block, times the gates.
template <class T>
void finish_gated(const Panel& panel, int64_t r, int64_t n, const float* totals) {
  const int64_t columns = panel.columns;
  const float* gates = panel.gates + r * kPanel;
  Word* to = element_of(*panel.next, r, panel.column);
  for (int64_t i = 0; i < n; ++i, totals += kPanel, gates += kPanel, to += kRowStride * kElementsOfWord) {
    Vec values[kPanelVectors];
#pragma GCC unroll 2
    for (int c = 0; c < kPanelVectors; ++c) {
      const Vec value = round_to<T>(Vec::load(totals + c * kLanes));
      values[c] = round_to<T>(Vec::load(gates + c * kLanes) * value);
    }
    store_panel(values, columns, to);
  }
}

template <class T>
void multiply(const LinearParams& p, int64_t row, const RowBlock& block, int64_t begin, int64_t end,
              const float* packed) {
  const Panel::Finish finish = with_activation(
      p.activation, []<Activation activation>() -> Panel::Finish { return finish_output<T, activation>; });
  for_each_panel(p, row, block, begin, end, packed, [&](const Panel& panel) { panel.run(finish); });
}

template <class T>
void multiply_to_block(const LinearParams& p, const RowBlock& block, int64_t begin, int64_t end, const float* packed,
                       const RowBlock& next) {
  const Panel::Finish finish = with_activation(
      p.activation, []<Activation activation>() -> Panel::Finish { return finish_to_block<T, activation>; });
  for_each_panel(p, 0, block, begin, end, packed, [&](Panel panel) {
    panel.next = &next;
    panel.run(finish);
  });
}

template <class T>
void multiply_gated_to_block(const LinearParams& gate, const LinearParams& p, const RowBlock& block, int64_t begin,
                             int64_t end, const float* gate_packed, const float* packed, float* gates,
                             const RowBlock& next) {
  const Panel::Finish finish = with_activation(
      gate.activation, []<Activation activation>() -> Panel::Finish { return finish_gates<T, activation>; });
  for_each_panel(p, 0, block, begin, end, packed, [&](Panel panel) {
    const float* packed_gate = gate_packed + (panel.packed - packed);
    panel.next_packed = packed_gate + gate.panel_stride;
    panel.next = &next;
    panel.gates = gates;
    const Panel of_gate{gate, 0, block, panel.column, panel.columns, packed_gate, panel.packed, nullptr, gates};
    of_gate.run(finish);
    panel.run(finish_gated<T>);
  });
}

template <class T>
LinearKernel make_kernel(const LinearParams& p) {
  const int64_t words = words_of(p.depth);
  return {kPanel,
          kRows,
          words * kPanel,
          divide_up(words, kDepthBlock) * kRowStride,
          kRowStride,
          kPairs,
          pack<T>,
          p.windows != nullptr    ? load_windows<T>
          : p.x_depth_stride == 1 ? load_rows<T>
                                  : load_columns<T>,
          multiply<T>,
          multiply_to_block<T>,
          multiply_gated_to_block<T>,
          normalize_rows};
}

}  // namespace

LinearKernel linear_kernel(const LinearParams& p) {
  return with_element<true>(p.element, [&]<class T>() { return make_kernel<T>(p); });
}

}  // namespace fastvit::FASTVIT_ISA
