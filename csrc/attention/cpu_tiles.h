// Building blocks of attention kernels, compiled once per instruction set. Queries are the lanes of every vector:
// products are of broadcast scalars (keys, values) with vectors of queries, softmax needs no reduction inside a vector,
// and neither head size nor key count is padded.
//
// With the bfloat16 dot product (kPairs) a word is a pair: of channels in q and k, of keys in the map and v.
#pragma once

#include "attention/args.h"
#include "attention/cpu_products.h"
#include "common/vec_transpose.h"

namespace fastvit::FASTVIT_ISA {
namespace {

inline int64_t padded(int64_t n) { return round_up(n, kLanes); }

// --- Packing ---------------------------------------------------------------------------------------------------------

inline float pair(bf16 low, bf16 high) {
  const uint32_t bits = low.bits | uint32_t{high.bits} << 16;
  float word;
  __builtin_memcpy(&word, &bits, 4);
  return word;
}

// To memory for whole vectors.
template <class T>
inline void widen_row(const T* row, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += kLanes) load(row + d, smaller(kLanes, dim - d)).store(out + d);
}

// The words of one row of `dim` elements: the row itself where its elements are words, else written to `buffer`.
template <class T>
inline const float* row_words(const T* row, int64_t dim, float* buffer) {
  if constexpr (sizeof(T) == 4) {
    return row;
  } else if constexpr (kPairs) {
    __builtin_memcpy(buffer, row, dim * 2);
    if (dim % 2) buffer[dim / 2] = pair(row[dim - 1], bf16{0});
    return buffer;
  } else {
    widen_row(row, dim, buffer);
    return buffer;
  }
}

// out[d * stride + i] = word d of row i, for the rows i < count that row(i) gives; zeros up to a multiple of four rows.
template <class T, class F>
inline void transpose_rows(int64_t count, int64_t dim, int64_t words, const F& row, float* out, int64_t stride) {
  float buffers[4][kAttentionMaxDim];
  static constexpr float zeros[kAttentionMaxDim] = {};
  for (int64_t first = 0; first < count; first += 4) {
    const float* rows[4];
    for (int64_t i = 0; i < 4; ++i) {
      rows[i] = first + i < count ? row_words(row(first + i), dim, buffers[i]) : zeros;
    }
    transpose4(rows, words, out + first, stride);
  }
}

// The packed keys and values of one head. Words are 32 bits: floats, or (kPairs) two bfloat16.
// Keys: panels of up to kRows keys, [panel][word of channels][key]. After them values: panels of up to kRows channels,
// [panel][word of keys][channel]. Every panel is kRows wide.
struct Packed {
  int64_t dim, count;
  Split key_panels, value_panels;
  int64_t key_words, value_words;  // of a panel
  int64_t head_words;

  static int64_t words(int64_t elements) { return words_of(elements); }

  Packed(int64_t dim, int64_t count)
      : dim(dim),
        count(count),
        key_panels(count, kRows),
        value_panels(dim, kRows),
        key_words(words(dim) * kRows),
        value_words(words(count) * kRows),
        head_words(key_panels.blocks * key_words + value_panels.blocks * value_words) {}

  int64_t key_panel(int64_t panel) const { return panel * key_words; }
  int64_t value_panel(int64_t panel) const { return key_panels.blocks * key_words + panel * value_words; }
};

// The tokens of one head.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;

  Rows(const AttentionOperand& operand, int64_t b, int64_t h)
      : first(static_cast<const T*>(operand.data) + b * operand.batch_stride + h * operand.head_stride),
        stride(operand.token_stride) {}
  const T* operator[](int64_t token) const { return first + token * stride; }
};

// f(rows) for the tokens of one head; kHalf: they may be float16.
template <bool kHalf = false, class F>
FASTVIT_INLINE auto with_rows(Element element, const AttentionOperand& operand, int64_t b, int64_t h, const F& f) {
  return with_element<kHalf>(element, [&]<class T>() { return f(Rows<T>(operand, b, h)); });
}

// One panel of a head's keys.
template <class T>
void pack_key_panel(Rows<T> k, const Packed& layout, const int32_t* keys, int64_t panel, float* packed) {
  constexpr int64_t kGroups = round_up(kRows, 4);  // four keys are transposed at a time
  float wide[kAttentionMaxDim * kGroups];
  const int64_t begin = layout.key_panels.begin(panel), count = layout.key_panels.size(panel);
  const int64_t words = layout.words(layout.dim);
  const int64_t last_ahead = layout.count < begin + 2 * kRows ? layout.count : begin + 2 * kRows;
  for (int64_t j = begin + count; j < last_ahead; ++j) prefetch(k[keys[j]], layout.dim);
  float* out = packed + layout.key_panel(panel);
  float* to = kGroups == kRows ? out : wide;
  transpose_rows<T>(count, layout.dim, words, [&](int64_t i) { return k[keys[begin + i]]; }, to, kGroups);
  if constexpr (kGroups != kRows) {
    for (int64_t d = 0; d < words; ++d) __builtin_memcpy(out + d * kRows, wide + d * kGroups, kRows * sizeof(float));
  }
}

// Word `word` of a head's values: one key, or two.
template <class T>
void pack_value_row(Rows<T> v, const Packed& layout, const int32_t* keys, int64_t word, float* packed) {
  const int64_t j = kPairs ? 2 * word : word;
  constexpr int64_t kAhead = 8;
  float row[kAttentionMaxDim + kRows];
  const T* first = v[keys[j]];
  if (j + kAhead < layout.count) prefetch(v[keys[j + kAhead]], layout.dim);
  if constexpr (kPairs) {
    const T* second = j + 1 < layout.count ? v[keys[j + 1]] : nullptr;
    for (int64_t d = 0; d < layout.dim; ++d) row[d] = pair(first[d], second == nullptr ? bf16{0} : second[d]);
  } else {
    widen_row(first, layout.dim, row);
  }
  for (int64_t panel = 0; panel < layout.value_panels.blocks; ++panel) {
    __builtin_memcpy(packed + layout.value_panel(panel) + word * kRows, row + layout.value_panels.begin(panel),
                     kRows * sizeof(float));  // a panel of fewer channels also copies those of the next one
  }
}

// --- Hidden keys ----------------------------------------------------------------------------------------------------
//
// A key that a mask or a bias of -inf hides from a query has zero for its weight, which hides what is finite in its
// row: zero times NaN or infinity is NaN. That shows in the result of a product, which is then made again without such
// keys.

// Vector `lane` of row j of a map, from words as the products read them.
FASTVIT_INLINE Vec map_row(const float* map, int64_t width, int64_t j, int64_t lane) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    const __m512i words = _mm512_castps_si512(Vec::load(map + j / 2 * width + lane).v);
    const __m512i second = _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return {_mm512_castsi512_ps(j % 2 == 0 ? _mm512_slli_epi32(words, 16) : second)};
  }
#endif
  return Vec::load(map + j * width + lane);
}

// out[d] = factor * sum_j rows[j][d] map[j] for kV vectors of queries, without the keys hidden from each; added to what
// is there, if asked for. hide(j, v, yes, no): `yes` in the lanes of vector v that key j of the list is hidden from.
template <int kV, class T, class Hide>
void product_of_visible(Rows<T> rows, AttentionKeys keys, int64_t dim, const float* map, float factor, const Hide& hide,
                        float* out, bool add) {
  constexpr int64_t kWidth = kV * kLanes;
  for (int64_t d = 0; d < dim; ++d) {
    for (int v = 0; v < kV; ++v) {
      float* to = out + d * kWidth + v * kLanes;
      Vec total = add ? Vec::load(to) : Vec::fill(0.0f);
      for (int64_t first = 0; first < keys.count; first += kPartialSum) {
        Vec part = Vec::fill(0.0f);
        for (int64_t j = first; j < smaller(keys.count, first + kPartialSum); ++j) {
          const Vec weight = map_row(map, kWidth, j, v * kLanes);
          part = hide(j, v, part, fma(weight, Vec::fill(widen(rows[keys.indices[j]][d])), part));
        }
        total = fma(part, Vec::fill(factor), total);
      }
      total.store(to);
    }
  }
}

inline bool has_nan(const float* from, int64_t floats) {  // whole vectors
  for (int64_t i = 0; i < floats; i += kLanes) {
    if (any_nan(Vec::load(from + i))) return true;
  }
  return false;
}

template <class T>
bool is_finite(const T* row, int64_t dim) {
  Vec zeros = Vec::fill(0.0f);
  for (int64_t d = 0; d < dim; d += kLanes) {
    zeros = fma(load(row + d, smaller(kLanes, dim - d)), Vec::fill(0.0f), zeros);
  }
  return !any_nan(zeros);
}

// --- Loading and storing tiles ---------------------------------------------------------------------------------------

// Four queries of one head, of which the first `left` exist, transposed to [word][lane], `width` lanes in a row.
template <class T>
void load_four_queries(Rows<T> q, int64_t first, int64_t left, int64_t dim, float* out, int64_t width) {
  const int64_t words = words_of(dim);
  for (int64_t i = 8; i < 12 && i < left; ++i) prefetch(q[first + i], dim);
  if (left > 0) {
    transpose_rows<T>(left < 4 ? left : 4, dim, words, [&](int64_t i) { return q[first + i]; }, out, width);
  } else {
    for (int64_t d = 0; d < words; ++d) __builtin_memset(out + d * width, 0, 4 * sizeof(float));
  }
}

// Four lanes of [channel][lane], of which the first `left` exist, transposed to rows. There is memory for a multiple of
// four channels.
template <class T>
void store_four_queries(const float* channels, int64_t width, int64_t left, int64_t dim, T* out, int64_t stride) {
  float buffer[4 * kAttentionMaxDim];
  const int64_t rows = left < 4 ? left : 4;
  for (int64_t i = 4; i < 8 && i < left; ++i) prefetch<1>(out + i * stride, dim);
  for (int64_t d = 0; d < dim; d += 4) {
    const float* in[4];
    for (int64_t k = 0; k < 4; ++k) in[k] = channels + (d + k) * width;
    transpose4(in, 4, buffer + d, kAttentionMaxDim);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = buffer + i * kAttentionMaxDim;
    for (int64_t d = 0; d < dim; d += kLanes) store(Vec::load(row + d), out + i * stride + d, smaller(kLanes, dim - d));
  }
}

// The mask of one head as [key][lane]: +inf where attended, -inf elsewhere; lanes beyond the last query repeat the
// first.
inline void expand_mask(const AttentionParams& p, int64_t b, int64_t h, int64_t first_query, int64_t queries,
                        AttentionKeys keys, float* out, int64_t width) {
  constexpr int kGroup = kLanes < 8 ? kLanes : 8;  // queries at a time, by eight keys: the bytes of one word
  typedef int32_t Ints __attribute__((vector_size(kGroup * sizeof(int32_t))));
  Ints lane_bit;
  for (int r = 0; r < kGroup; ++r) lane_bit[r] = 1 << r;
  // The list of keys has all of them: only a mask over keys alone shortens it.
  const bool* head = p.mask + b * p.mask_batch_stride + h * p.mask_head_stride +
                     (keys.count > 0 ? keys.indices[0] : 0) * p.mask_key_stride;
  const bool whole_words = p.mask_key_stride == 1 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
  for (int64_t i = 0; i < width; i += kGroup) {
    for (int64_t j = 0; j < keys.count; j += 8) {
      const int64_t count = keys.count - j < 8 ? keys.count - j : 8;
      uint64_t bits = 0;  // bit r of byte n: whether query i + r attends to key j + n
      for (int r = 0; r < kGroup; ++r) {
        const bool* row = head + (first_query + (i + r < queries ? i + r : 0)) * p.mask_query_stride;
        uint64_t bytes = 0;
        if (whole_words && count == 8) {
          __builtin_memcpy(&bytes, row + j, 8);
        } else {
          for (int64_t n = 0; n < count; ++n) bytes |= uint64_t{row[(j + n) * p.mask_key_stride]} << 8 * n;
        }
        bits |= bytes << r;
      }
      for (int64_t n = 0; n < count; ++n, bits >>= 8) {
        const Ints masked = (lane_bit & static_cast<int32_t>(bits & 0xff)) == 0;
        const Ints limit = (masked & INT32_MIN) | 0x7f800000;  // the bits of infinity, with the sign
        __builtin_memcpy(out + (j + n) * width + i, &limit, sizeof limit);
      }
    }
  }
}

// tile(width in vectors, first query, queries) for queries [begin, end), in tiles of one or two vectors.
template <class F>
void for_tiles(int64_t begin, int64_t end, const F& tile) {
  for (int64_t query = begin; query < end;) {
    const int64_t left = end - query;
    if (left > kLanes) {
      tile(Int<2>{}, query, left < 2 * kLanes ? left : 2 * kLanes);
      query += 2 * kLanes;
    } else {
      tile(Int<1>{}, query, left);
      query += kLanes;
    }
  }
}

#if defined(__AVX512BF16__)
// Rounds lane i of both to a pair.
FASTVIT_INLINE Vec round_to_pairs(Vec low, Vec high) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave, halves))};
}
#endif

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
