// A linear layer and its activation, compiled once per instruction set.
//
// Columns are the lanes of every vector. A tile of the result is kRows rows by a panel of kPanelVectors vectors; its
// sums stay in registers while words of x are broadcast and multiplied by the packed weight:
//   sums[r][c] += x[r][k] * weight[k][c]
// Every kPartialSum terms the sums are added to the tile's totals, which start with the bias: partial sums keep the
// rounding error of long sums small. The rows of x are copied, a block of the depth at a time, to rows a constant
// distance apart: it fits the addressing modes, and is no power of two, at which rows would share cache sets.
//
// With the bfloat16 dot product (kPairs) a word is a pair along the depth, and the sums are float32.
#include "linear/args.h"

#include "common/vec_activation.h"
#include "common/vec_product.h"
#include "common/vec_transpose.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int kPanelVectors = 2;
constexpr int64_t kPanel = kPanelVectors * kLanes;
constexpr int kRows = Vec::lanes == 16 ? 14 : 6;  // as many sums as the registers hold beside the operands
constexpr int64_t kDepthBlock = 512;              // words of x in a row of the copy
constexpr int64_t kRowStride = kDepthBlock + 16;
// Terms of a partial sum; more for bfloat16, whose results are rounded far more coarsely.
template <bool kPairs>
constexpr int64_t kPartialSum = kPairs ? kDepthBlock : 192;

// --- Words: floats, or pairs of bfloat16 -----------------------------------------------------------------------------

// Copies `count` words from element `first` of a contiguous row of `depth` elements; the last pair's missing half is
// zero.
template <class T, bool kPairs>
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

constexpr int64_t kStepsAhead = 8;           // of the packed weight, prefetched from the L2 cache
constexpr int64_t kWordsAhead = 2 * kLanes;  // of each row: too many rows for the hardware prefetcher

// Packs a panel whose columns are contiguous rows of the weight.
template <class T, bool kPairs>
void pack_rows(const LinearParams& p, int64_t column, int64_t columns, float* to) {
  constexpr bool kInPlace = kPairs || sizeof(T) == sizeof(float);  // a row's elements already are words
  constexpr int64_t kElements = kPairs ? 2 : 1;
  const int64_t words = words_of<kPairs>(p.depth), whole = kInPlace ? p.depth / kElements : 0;
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
        if (c + i < columns) copy_words<T, kPairs>(row, p.depth, k * kElements, smaller(kLanes, words - k), buffer[i]);
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
template <class T, bool kPairs>
void pack_columns(const LinearParams& p, int64_t column, int64_t columns, float* to) {
  const T* weight = static_cast<const T*>(p.weight) + column;
  for (int64_t k = 0; k < words_of<kPairs>(p.depth); ++k, to += kPanel) {
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

template <class T, bool kPairs>
void pack(const LinearParams& p, int64_t begin, int64_t end, float* packed) {
  const int64_t words = words_of<kPairs>(p.depth);
  for (int64_t panel = begin; panel < end; ++panel, packed += words * kPanel) {
    const int64_t column = panel * kPanel, columns = smaller(kPanel, p.columns - column);
    if (p.weight_depth_stride == 1) {
      pack_rows<T, kPairs>(p, column, columns, packed);
    } else {
      pack_columns<T, kPairs>(p, column, columns, packed);
    }
  }
}

// --- A tile ----------------------------------------------------------------------------------------------------------

// Software-prefetches the rows of x that the next tile copies, a cache line at a time while this tile is computed: they
// are too many for the hardware prefetcher. A prefetch beyond x is harmless.
class PrefetchRows {
 public:
  PrefetchRows(const void* first, int64_t stride, int64_t rows)
      : line_(static_cast<const char*>(first)), stride_(stride), rows_(rows) {}

  FASTVIT_INLINE void next_line() {
    __builtin_prefetch(line_ + row_ * stride_);
    if (++row_ == rows_) {
      row_ = 0;
      line_ += 64;
    }
  }

 private:
  const char* line_;
  int64_t stride_, rows_, row_ = 0;  // stride in bytes
};

struct NoPrefetch {
  FASTVIT_INLINE void next_line() {}
};

// sink(r, c, sum) for every partial sum of sum_k x[r][k] weight[k][c] over `words` words. One line is prefetched per
// word: the rows of a tile have fewer lines than words.
template <bool kPairs, int kR, class Prefetch, class Sink>
FASTVIT_INLINE void add_products(int64_t words, const float* x, const float* weight, Prefetch prefetch_x,
                                 const Sink& sink) {
  for (int64_t first = 0; first < words; first += kPartialSum<kPairs>) {
    const int64_t end = smaller(words, first + kPartialSum<kPairs>);
    Vec sums[kR][kPanelVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < kPanelVectors; ++c) sums[r][c] = Vec::fill(0.0f);
    }
    for (int64_t k = first; k < end; ++k) {
      Vec columns[kPanelVectors];
#pragma GCC unroll 2
      for (int c = 0; c < kPanelVectors; ++c) columns[c] = Vec::load(weight + k * kPanel + c * kLanes);
      prefetch_x.next_line();
      __builtin_prefetch(weight + (k + kStepsAhead) * kPanel);
      __builtin_prefetch(weight + (k + kStepsAhead) * kPanel + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kR; ++r) {
        const Vec row = Vec::fill(x[r * kRowStride + k]);
#pragma GCC unroll 2
        for (int c = 0; c < kPanelVectors; ++c) sums[r][c] = multiply_add<kPairs>(row, columns[c], sums[r][c]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < kPanelVectors; ++c) sink(r, c, sums[r][c]);
    }
  }
}

// totals[r][c] += sum_k x[r][k] weight[k][c].
template <bool kPairs, int kR, class Prefetch>
void add_to_totals(int64_t words, const float* x, const float* weight, float* totals, Prefetch prefetch_x) {
  add_products<kPairs, kR>(words, x, weight, prefetch_x, [&](int r, int c, Vec sum) __attribute__((always_inline)) {
    float* total = totals + r * kPanel + c * kLanes;
    (Vec::load(total) + sum).store(total);
  });
}

// out[r][c] = bias[c] + sum_k x[r][k] weight[k][c], for sums of one partial sum.
template <bool kPairs, class T, class Prefetch>
void store_short_sums(int64_t words, const float* x, const float* weight, const float* bias, T* out, int64_t stride,
                      Prefetch prefetch_x) {
  Vec results[kPanelVectors];
  add_products<kPairs, kRows>(words, x, weight, prefetch_x, [&](int r, int c, Vec sum) __attribute__((always_inline)) {
    results[c] = Vec::load(bias + c * kLanes) + sum;
    if (c + 1 == kPanelVectors) store_two(results[0], results[1], out + r * stride);
  });
}

// The rows of a tile against all panels of a group.
template <class T, bool kPairs>
struct Tile {
  const LinearParams& p;
  int64_t row, rows, begin_panel, end_panel;
  const float* packed;
  float *copy, *totals;

  int64_t columns(int64_t panel) const { return smaller(kPanel, p.columns - panel * kPanel); }
  float* total(int64_t panel, int64_t r) const { return totals + ((panel - begin_panel) * kRows + r) * kPanel; }

  // Panels before it are stored straight from registers: whole panels of sums that are a single partial sum, without an
  // activation, whose constants would not fit beside the sums.
  int64_t first_panel_with_totals(int64_t words) const {
    const bool is_short = words > 0 && words <= kPartialSum<kPairs> && words <= kDepthBlock;
    if (!is_short || rows < kRows || p.accumulate || p.activation != Activation::none) return begin_panel;
    const int64_t whole = p.columns / kPanel;
    return whole < begin_panel ? begin_panel : smaller(whole, end_panel);
  }

  void run() const {
    const int64_t words = words_of<kPairs>(p.depth);
    const int64_t first_total = first_panel_with_totals(words);
    start(first_total);
    for (int64_t first = 0; first < words; first += kDepthBlock) {
      const int64_t count = smaller(kDepthBlock, words - first);
      copy_rows(first, count);
      for (int64_t panel = begin_panel; panel < end_panel; ++panel) {
        if (first == 0) prefetch_out(panel);
        const float* weight = packed + ((panel - begin_panel) * words + first) * kPanel;
        if (rows < kRows) {
          with_constant<kRows>(rows, [&](auto n) {
            add_to_totals<kPairs, n.value>(count, copy, weight, total(panel, 0), NoPrefetch());
          });
        } else if (panel == begin_panel) {
          const T* below = static_cast<const T*>(p.x) + (row + rows) * p.x_stride + first * (kPairs ? 2 : 1);
          multiply(panel, count, weight, panel < first_total,
                   PrefetchRows(below, p.x_stride * static_cast<int64_t>(sizeof(T)), rows));
        } else {
          multiply(panel, count, weight, panel < first_total, NoPrefetch());
        }
      }
    }
    with_activation(p.activation, [&]<Activation activation>() { finish<activation>(first_total); });
  }

  // A panel of a whole tile.
  template <class Prefetch>
  void multiply(int64_t panel, int64_t words, const float* weight, bool directly, Prefetch prefetch_x) const {
    if (directly) {
      T* out = static_cast<T*>(p.out) + row * p.columns + panel * kPanel;
      store_short_sums<kPairs>(words, copy, weight, p.bias + panel * kPanel, out, p.columns, prefetch_x);
    } else {
      add_to_totals<kPairs, kRows>(words, copy, weight, total(panel, 0), prefetch_x);
    }
  }

  // Initialises the totals of the panels from `first_panel` on.
  void start(int64_t first_panel) const {
    // The bias is the same for all rows, unlike the previous result.
    const float* from = p.accumulate ? static_cast<const float*>(p.out) + row * p.columns : p.bias;
    const int64_t step = p.accumulate ? p.columns : 0;
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      for (int64_t c = 0; c < kPanel; c += kLanes) {
        const int64_t column = panel * kPanel + c, left = columns(panel) - c;
        for (int64_t r = 0; r < rows; ++r) {
          const float* start = from + r * step + column;
          const Vec value = left > 0 ? load(start, smaller(kLanes, left)) : Vec::fill(0.0f);
          value.store(total(panel, r) + c);
        }
      }
    }
  }

  // Prefetches a panel of the result, which is written once all sums are done.
  void prefetch_out(int64_t panel) const {
    for (int64_t r = 0; r < rows; ++r) {
      const T* out = static_cast<const T*>(p.out) + (row + r) * p.columns + panel * kPanel;
      for (int64_t c = 0; c < kPanel; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(out + c, 1);
    }
  }

  void copy_rows(int64_t first, int64_t count) const {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = static_cast<const T*>(p.x) + (row + r) * p.x_stride;
      copy_words<T, kPairs>(from, p.depth, first * (kPairs ? 2 : 1), count, copy + r * kRowStride);
    }
  }

  // The results of the panels from `first_panel` on, from their totals.
  template <Activation activation>
  void finish(int64_t first_panel) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t panel = first_panel; panel < end_panel; ++panel) {
        T* out = static_cast<T*>(p.out) + (row + r) * p.columns + panel * kPanel;
        if (columns(panel) == kPanel) {
          Vec values[kPanelVectors];
#pragma GCC unroll 2
          for (int c = 0; c < kPanelVectors; ++c) values[c] = Vec::load(total(panel, r) + c * kLanes);
          activate<activation>(values);
          store_two(values[0], values[1], out);
          continue;
        }
        for (int64_t c = 0; c < columns(panel); c += kLanes) {
          store(activate<activation>(Vec::load(total(panel, r) + c)), out + c, smaller(kLanes, columns(panel) - c));
        }
      }
    }
  }
};

template <class T, bool kPairs>
void multiply(const LinearParams& p, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
              const float* packed, float* scratch) {
  for (int64_t row = row_begin; row < row_end;) {
    // Whole tiles, except that the last two may share the rest evenly: a tile of few rows waits on latency.
    const int64_t left = row_end - row;
    const int64_t rows = left > kRows && left < kRows + kRows / 2 ? left / 2 : smaller(kRows, left);
    Tile<T, kPairs>{p, row, rows, begin, end, packed, scratch, scratch + kRows * kRowStride}.run();
    row += rows;
  }
}

template <class T, bool kPairs>
LinearKernel make_kernel(const LinearParams& p) {
  return {kPanel,
          kRows,
          words_of<kPairs>(p.depth) * kPanel,
          kRows * kPanel,
          kRows * kRowStride,
          pack<T, kPairs>,
          multiply<T, kPairs>};
}

}  // namespace

LinearKernel linear_kernel(const LinearParams& p) {
  return p.bfloat16 ? make_kernel<bf16, kHasPairs>(p) : make_kernel<float, false>(p);
}

}  // namespace fastvit::FASTVIT_ISA
