// Attention whose maps are mixed across heads, forward, for one instruction set.
//
// A tile is one or two vectors of queries, for all heads. Queries are the lanes of every vector, so that
//   S_h[j] = sum_d k_h[j][d] q_h[d]       P_h[j] = exp(S_h[j] - max) / sum       M_h[j] = b_h + sum_g A[h][g] P_g[j]
//   out_h[d] = sum_j v_h[j][d] M_h[j]
// are one product each of broadcast scalars (keys, mixing matrix, values) with vectors of queries; softmax needs no
// reduction inside a vector; and neither head size nor key count is padded. The maps of a tile, (H, keys, lanes)
// floats, stay in the caches; no other map exists. A bias starts the sums of the mix, where it costs nothing.
//
// Keys and values are packed once per batch element (see pack). With the bfloat16 dot product (two terms a lane and
// instruction) the packed words hold pairs: of channels in q and k, of keys in the finished map and v.
#include "head_mixed_attention.h"
#include "vec.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t kLanes = Vec::lanes;
constexpr int kTileVectors = 2;
// Blocks of a product: rows (broadcast scalars) x columns (vectors), as many sums as registers hold beside the
// operands.
constexpr bool k32Registers = Vec::lanes == 16;
constexpr int kRows = k32Registers ? 12 : 6;
constexpr int kMixRows = 6;
constexpr int kMixColumns = k32Registers ? 4 : 2;

// Terms summed in one go: longer sums are made of partial sums, whose rounding errors are smaller.
#if defined(__FMA__) || !defined(__SSE__)
constexpr int64_t kPartialSum = 64;
#else
constexpr int64_t kPartialSum = 16;  // every product is rounded, too
#endif

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

template <int N>
struct Int {
  static constexpr int value = N;
};

// f(Int<n>) for a run-time n in [1, N].
template <int N, class F>
inline void with_constant(int64_t n, const F& f) {
  if constexpr (N > 1) {
    if (n < N) return with_constant<N - 1>(n, f);
  }
  f(Int<N>{});
}

// n things in the fewest blocks of at most kLargest, as even as can be.
struct Split {
  int64_t n, blocks;
  Split(int64_t n, int64_t largest) : n(n), blocks((n + largest - 1) / largest) {}
  int64_t begin(int64_t block) const { return block * n / blocks; }
};

// --- Products -------------------------------------------------------------------------------------------------------

// a * b + c on floats, or c + the sum of two products of bfloat16 where a lane holds a pair.
template <bool kPairs>
FASTVIT_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
#endif
  return fma(a, b, c);
}

// sums[r][c] += sum_k a[k][r] * b[k][c]: rows r broadcast from a, columns c vectors of b.
template <bool kPairs, int kR, int kC>
FASTVIT_INLINE void product(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                            Vec (&sums)[kR][kC]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[kC];
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) columns[c] = Vec::load(b + c * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const Vec row = Vec::fill(a[r]);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sums[r][c] = multiply_add<kPairs>(row, columns[c], sums[r][c]);
    }
    a += a_stride;
    b += b_stride;
  }
}

// out[r * kC * kLanes + c * kLanes] = factor * sum_k a[k][r] * b[k][c], in partial sums.
template <bool kPairs, int kR, int kC>
FASTVIT_INLINE void product_to(int64_t depth, const float* a, int64_t a_stride, const float* b, Vec factor,
                               float* out) {
  for (int64_t first = 0; first < depth || first == 0; first += kPartialSum) {
    const int64_t terms = depth - first < kPartialSum ? depth - first : kPartialSum;
    Vec sums[kR][kC] = {};
    product<kPairs>(terms, a + first * a_stride, a_stride, b + first * kC * kLanes, kC * kLanes, sums);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) {
        float* to = out + (r * kC + c) * kLanes;
        const Vec before = first == 0 ? Vec::fill(0.0f) : Vec::load(to);
        fma(sums[r][c], factor, before).store(to);
      }
    }
  }
}

// --- Packing --------------------------------------------------------------------------------------------------------

template <class T>
inline void convert(const float* in, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Vec::load(in + i).store(out + i);
  if (i < n) Vec::load(in + i, n - i).store(out + i, n - i);
}

// How elements T lie in packed words of 32 bits: as floats, or (kPairs) two bfloat16 a word.
template <class T, bool kPairs>
struct Format {
  static int64_t words(int64_t elements) { return kPairs ? (elements + 1) / 2 : elements; }

  static int64_t key_words(const HeadMixParams& p, int64_t count) {
    return words(p.dim) * kRows * Split(count, kRows).blocks + 4;  // transpose4 may write past the last panel
  }
  static int64_t value_words(const HeadMixParams& p, int64_t count) { return words(count) * p.dim; }
  static int64_t head_words(const HeadMixParams& p, int64_t count) {
    return key_words(p, count) + value_words(p, count);
  }
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float widened;
  __builtin_memcpy(&widened, &bits, 4);
  return widened;
}

inline float pair(bf16 low, bf16 high) {
  const uint32_t bits = low.bits | uint32_t{high.bits} << 16;
  float word;
  __builtin_memcpy(&word, &bits, 4);
  return word;
}

// The words of one row of `dim` elements: in place where they lie so already, else written to `buffer`.
template <class T, bool kPairs>
inline const float* row_words(const T* row, int64_t dim, float* buffer) {
  if constexpr (sizeof(T) == 4) {
    return row;
  } else if constexpr (kPairs) {
    __builtin_memcpy(buffer, row, dim * 2);
    if (dim % 2) buffer[dim / 2] = pair(row[dim - 1], bf16{0});
    return buffer;
  } else {
    for (int64_t d = 0; d < dim; ++d) buffer[d] = to_float(row[d]);
    return buffer;
  }
}

// out[d * stride + i] = rows[i][d] for four rows.
inline void transpose4(const float* const (&rows)[4], int64_t length, float* out, int64_t stride) {
  int64_t d = 0;
#if defined(__SSE__)
  for (; d + 4 <= length; d += 4) {
    __m128 a = _mm_loadu_ps(rows[0] + d), b = _mm_loadu_ps(rows[1] + d);
    __m128 c = _mm_loadu_ps(rows[2] + d), e = _mm_loadu_ps(rows[3] + d);
    _MM_TRANSPOSE4_PS(a, b, c, e);
    _mm_storeu_ps(out + d * stride, a);
    _mm_storeu_ps(out + (d + 1) * stride, b);
    _mm_storeu_ps(out + (d + 2) * stride, c);
    _mm_storeu_ps(out + (d + 3) * stride, e);
  }
#endif
  for (; d < length; ++d) {
    for (int i = 0; i < 4; ++i) out[d * stride + i] = rows[i][d];
  }
}

// out[d * stride + i] = word d of row i, for rows i < count given by row(i); zeros up to a multiple of four rows.
template <class T, bool kPairs, class F>
inline void transpose_rows(int64_t count, int64_t dim, const F& row, float* out, int64_t stride) {
  float buffers[4][kHeadMixMaxDim];
  constexpr float zeros[kHeadMixMaxDim] = {};
  // From the last group to the first: where a group is wider than what is left of a row, the next one overwrites it.
  for (int64_t first = (count - 1) / 4 * 4; first >= 0; first -= 4) {
    const float* rows[4];
    for (int64_t i = 0; i < 4; ++i) {
      rows[i] = first + i < count ? row_words<T, kPairs>(row(first + i), dim, buffers[i]) : zeros;
    }
    transpose4(rows, Format<T, kPairs>::words(dim), out + first, stride);
  }
}

// Keys: panels of up to kRows keys, [panel][word][key]. Values behind them: [key or pair of keys][channel].
template <class T, bool kPairs>
void pack(const HeadMixParams& p, int64_t b, int64_t h, HeadMixKeys keys, float* packed) {
  using F = Format<T, kPairs>;
  packed += h * F::head_words(p, keys.count);
  const T* k = static_cast<const T*>(p.k.data) + b * p.k.batch_stride + h * p.k.head_stride;
  const Split panels(keys.count, kRows);
  for (int64_t panel = 0; panel < panels.blocks; ++panel) {
    const int64_t begin = panels.begin(panel);
    transpose_rows<T, kPairs>(
        panels.begin(panel + 1) - begin, p.dim,
        [&](int64_t i) { return k + keys.indices[begin + i] * p.k.token_stride; },
        packed + panel * kRows * F::words(p.dim), kRows);
  }
  const T* v = static_cast<const T*>(p.v.data) + b * p.v.batch_stride + h * p.v.head_stride;
  float* out = packed + F::key_words(p, keys.count);
  for (int64_t j = 0; j < keys.count; j += kPairs ? 2 : 1, out += p.dim) {
    const T* row = v + keys.indices[j] * p.v.token_stride;
    if constexpr (kPairs) {
      const T* next = j + 1 < keys.count ? v + keys.indices[j + 1] * p.v.token_stride : nullptr;
      for (int64_t d = 0; d < p.dim; ++d) out[d] = pair(row[d], next == nullptr ? bf16{0} : next[d]);
    } else {
      for (int64_t d = 0; d < p.dim; ++d) out[d] = to_float(row[d]);
    }
  }
}

// x where `limit` is +inf, zero where it is -inf.
FASTVIT_INLINE Vec where_attended(Vec limit, Vec x) {
  typedef int32_t Ints __attribute__((vector_size(sizeof(Vec))));
  Ints masked, bits;
  __builtin_memcpy(&masked, &limit, sizeof limit);
  __builtin_memcpy(&bits, &x, sizeof x);
  bits &= ~(masked >> 31);
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// --- One tile -------------------------------------------------------------------------------------------------------

// A thread's scratch for a tile.
struct Scratch {
  int64_t map_stride;
  float* maps;     // [head][key][lane]: logits, then exponentials, then the finished map
  float* mask;     // [head or 1][key][lane]: +inf where attended to, -inf elsewhere
  float* inverse;  // [head][lane]: 1 / sum of exponentials
  float* staged;   // [head][column of the mix's block][lane]
  float* operand;  // one head's queries or output, [channel][lane]

  static constexpr int64_t kWidth = kTileVectors * kLanes;
  static int64_t stride_of(int64_t keys) {
    return (keys + kMixColumns) * kWidth + kLanes;  // heads shifted against each other in the cache's sets
  }
  static int64_t mask_heads(const HeadMixParams& p) {
    return p.mask == nullptr ? 0 : p.mask_head_stride == 0 ? 1 : p.heads;
  }
  static int64_t floats(const HeadMixParams& p) {
    return (p.heads + mask_heads(p)) * stride_of(p.keys) + p.heads * (kWidth + kMixColumns * kLanes) +
           (kHeadMixMaxDim + 4) * kWidth;
  }
  Scratch(const HeadMixParams& p, float* memory) : map_stride(stride_of(p.keys)), maps(memory) {
    mask = maps + p.heads * map_stride;
    inverse = mask + mask_heads(p) * map_stride;
    staged = inverse + p.heads * kWidth;
    operand = staged + p.heads * kMixColumns * kLanes;
  }
};

template <class T, bool kPairs, int kV>  // kV vectors of queries
struct Tile {
  using F = Format<T, kPairs>;
  static constexpr int64_t kWidth = kV * kLanes;

  const HeadMixParams& p;
  const Scratch& s;
  int64_t b, first_query, queries;  // queries <= kWidth
  HeadMixKeys keys;
  const int64_t count = keys.count;

  float* map(int64_t h) const { return s.maps + h * s.map_stride; }
  const float* mask(int64_t h) const { return p.mask_head_stride == 0 ? s.mask : s.mask + h * s.map_stride; }

  // S_h, all keys.
  void logits(int64_t h, const float* packed_keys) const {
    const T* q = static_cast<const T*>(p.q.data) + b * p.q.batch_stride + h * p.q.head_stride;
    const int64_t depth = F::words(p.dim);
    transpose_rows<T, kPairs>(
        queries, p.dim, [&](int64_t i) { return q + (first_query + i) * p.q.token_stride; }, s.operand, kWidth);
    for (int64_t i = (queries + 3) / 4 * 4; i < kWidth; ++i) {
      for (int64_t d = 0; d < depth; ++d) s.operand[d * kWidth + i] = 0.0f;
    }
    const Split panels(count, kRows);
    const Vec scale = Vec::fill(p.scale);
    for (int64_t panel = 0; panel < panels.blocks; ++panel, packed_keys += kRows * depth) {
      float* out = map(h) + panels.begin(panel) * kWidth;
      with_constant<kRows>(panels.begin(panel + 1) - panels.begin(panel), [&](auto rows) {
        product_to<kPairs, rows.value, kV>(depth, packed_keys, kRows, s.operand, scale, out);
      });
    }
  }

  // Every column (key, vector of queries) of the maps, times `factor` [head][lane] if given, becomes weight . column +
  // bias, in place, zero where masked if `finish`; `finish` also packs pairs of keys where the product with v wants
  // them.
  template <bool kFinish>
  void mix(const float* weight, const float* bias) const {
    constexpr int kKeys = kMixColumns / kV;
    const Split blocks(p.heads, kMixRows);
    for (int64_t j = 0; j < count; j += kKeys) {
      stage<kFinish>(j);
      if (weight == nullptr) {
        for (int64_t h = 0; h < p.heads; ++h) store_unmixed(h, j);
        continue;
      }
      for (int64_t block = 0; block < blocks.blocks; ++block) {
        const int64_t h = blocks.begin(block);
        with_constant<kMixRows>(blocks.begin(block + 1) - h, [&](auto rows) {
          Vec sums[rows.value][kMixColumns];
#pragma GCC unroll 8
          for (int r = 0; r < rows.value; ++r) {
#pragma GCC unroll 8
            for (int c = 0; c < kMixColumns; ++c) sums[r][c] = Vec::fill(bias[h + r]);
          }
          product<false>(p.heads, weight + h, p.heads, s.staged, kMixColumns * kLanes, sums);
#pragma GCC unroll 8
          for (int r = 0; r < rows.value; ++r) store_mixed<kFinish>(h + r, j, sums[r]);
        });
      }
    }
  }

  // Without a mix, the finished map is factor * P_h + bias.
  void store_unmixed(int64_t h, int64_t j) const {
    const Vec factor = Vec::fill(p.post_factor[h]), bias = Vec::fill(p.post_bias[h]);
    Vec columns[kMixColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kMixColumns; ++c) {
      columns[c] = fma(Vec::load(s.staged + (h * kMixColumns + c) * kLanes), factor, bias);
    }
    store_mixed<true>(h, j, columns);
  }

  template <bool kScaled>
  void stage(int64_t j) const {
    for (int64_t g = 0; g < p.heads; ++g) {
      const float* in = map(g) + j * kWidth;
#pragma GCC unroll 8
      for (int c = 0; c < kMixColumns; ++c) {
        Vec x = Vec::load(in + c * kLanes);
        if constexpr (kScaled) x = x * Vec::load(s.inverse + g * kWidth + c % kV * kLanes);
        x.store(s.staged + (g * kMixColumns + c) * kLanes);
      }
    }
  }

  // Columns past the last key land in the padding of the map; but a pair's second key that does not exist must be zero.
  template <bool kFinish>
  void store_mixed(int64_t h, int64_t j, Vec (&sums)[kMixColumns]) const {
    if constexpr (kFinish) {
      if (p.mask != nullptr) {
#pragma GCC unroll 8
        for (int c = 0; c < kMixColumns; ++c) {
          sums[c] = where_attended(Vec::load(mask(h) + j * kWidth + c * kLanes), sums[c]);
        }
      }
    }
#if defined(__AVX512BF16__)
    if constexpr (kFinish && kPairs) {
      const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                  22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 8
      for (int key = 0; key < kMixColumns / kV; key += 2) {
#pragma GCC unroll 8
        for (int c = 0; c < kV; ++c) {
          const Vec even = sums[key * kV + c];
          const Vec odd = j + key + 1 < count ? sums[(key + 1) * kV + c] : Vec::fill(0.0f);
          const __m512i words = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v));
          _mm512_storeu_si512(map(h) + (j + key) / 2 * kWidth + c * kLanes, words);
        }
      }
      return;
    }
#endif
#pragma GCC unroll 8
    for (int c = 0; c < kMixColumns; ++c) sums[c].store(map(h) + j * kWidth + c * kLanes);
  }

  // exp(S_h - max) in place, and 1 / its sum over keys; a row with no key left gets zeros.
  void softmax(int64_t h) const {
    Vec largest[kV], sum[kV];
    // With a mask, a row may have no key left; its largest logit must be finite for the difference to be.
    const float least = p.mask == nullptr ? -__builtin_inff() : -__FLT_MAX__;
    for (int c = 0; c < kV; ++c) largest[c] = Vec::fill(least), sum[c] = Vec::fill(0.0f);
    for (int64_t j = 0; j < count; ++j) {
      float* row = map(h) + j * kWidth;
#pragma GCC unroll 8
      for (int c = 0; c < kV; ++c) {
        Vec x = Vec::load(row + c * kLanes);
        if (p.mask != nullptr) {
          const Vec limit = Vec::load(mask(h) + j * kWidth + c * kLanes);
          x = min(x, limit);
          x.store(row + c * kLanes);
        }
        largest[c] = max(x, largest[c]);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      float* row = map(h) + j * kWidth;
#pragma GCC unroll 8
      for (int c = 0; c < kV; ++c) {
        const Vec e = exp(Vec::load(row + c * kLanes) - largest[c]);
        sum[c] = sum[c] + e;
        e.store(row + c * kLanes);
      }
    }
    for (int c = 0; c < kV; ++c) {
      // The sum is zero only where every exponential is: any finite inverse will do.
      (Vec::fill(1.0f) / max(Vec::fill(__FLT_MIN__), sum[c])).store(s.inverse + h * kWidth + c * kLanes);
    }
  }

  // M_h v_h to the output.
  void output(int64_t h, const float* packed_values) const {
    const Split blocks(p.dim, kRows);
    for (int64_t block = 0; block < blocks.blocks; ++block) {
      const int64_t d = blocks.begin(block);
      with_constant<kRows>(blocks.begin(block + 1) - d, [&](auto rows) {
        product_to<kPairs, rows.value, kV>(F::words(count), packed_values + d, p.dim, map(h), Vec::fill(1.0f),
                                           s.operand + d * kWidth);
      });
    }
    T* out = static_cast<T*>(p.out) + ((b * p.queries + first_query) * p.heads + h) * p.dim;
    for (int64_t i = 0; i < queries; i += 4) store_rows(i, out + i * p.heads * p.dim);
  }

  // Rows i .. i + 3 (as far as they exist) of [channel][lane] to rows of channels.
  void store_rows(int64_t i, T* out) const {
    const int64_t rows = queries - i < 4 ? queries - i : 4, stride = p.heads * p.dim;
    float buffer[4 * kHeadMixMaxDim];
    for (int64_t d = 0; d < p.dim; d += 4) {
      const float* in[4];
      for (int64_t k = 0; k < 4; ++k) in[k] = s.operand + (d + k) * kWidth + i;
      transpose4(in, 4, buffer + d, kHeadMixMaxDim);
    }
    for (int64_t k = 0; k < rows; ++k) convert(buffer + k * kHeadMixMaxDim, p.dim, out + k * stride);
  }

  void expand_mask() const {
    const int64_t heads = Scratch::mask_heads(p);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t query = first_query + (i < queries ? i : 0);
        const bool* row = p.mask + b * p.mask_batch_stride + h * p.mask_head_stride + query * p.mask_query_stride;
        float* out = s.mask + h * s.map_stride + i;
        for (int64_t j = 0; j < count; ++j) {
          out[j * kWidth] = row[keys.indices[j] * p.mask_key_stride] ? __builtin_inff() : -__builtin_inff();
        }
      }
    }
  }

  void run(const float* packed) const {
    const int64_t head_words = F::head_words(p, count), key_words = F::key_words(p, count);
    if (p.mask != nullptr) expand_mask();
    for (int64_t h = 0; h < p.heads; ++h) logits(h, packed + h * head_words);
    if (p.pre_weight != nullptr) mix<false>(p.pre_weight, p.pre_bias);
    for (int64_t h = 0; h < p.heads; ++h) softmax(h);
    mix<true>(p.post_weight, p.post_bias);
    for (int64_t h = 0; h < p.heads; ++h) output(h, packed + h * head_words + key_words);
  }
};

template <class T, bool kPairs>
void attend(const HeadMixParams& p, int64_t b, int64_t begin, int64_t end, HeadMixKeys keys, const float* packed,
            float* memory) {
  const Scratch scratch(p, memory);
  for (int64_t query = begin; query < end;) {
    const int64_t left = end - query;
    if (left > kLanes) {
      Tile<T, kPairs, 2>{p, scratch, b, query, left < 2 * kLanes ? left : 2 * kLanes, keys}.run(packed);
      query += 2 * kLanes;
    } else {
      Tile<T, kPairs, 1>{p, scratch, b, query, left, keys}.run(packed);
      query += kLanes;
    }
  }
}

template <class T, bool kPairs>
HeadMixKernel make_kernel(const HeadMixParams& p) {
  return {kLanes, p.heads * Format<T, kPairs>::head_words(p, p.keys), Scratch::floats(p), pack<T, kPairs>,
          attend<T, kPairs>};
}

}  // namespace

HeadMixKernel head_mix_kernel(const HeadMixParams& p) {
  return p.bfloat16 ? make_kernel<bf16, kHasPairs>(p) : make_kernel<float, false>(p);
}

}  // namespace fastvit::FASTVIT_ISA
