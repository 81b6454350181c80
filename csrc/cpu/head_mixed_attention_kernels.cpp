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
// Blocks of a product: rows (broadcast scalars) times columns (vectors), as many sums as registers hold beside
// operands.
constexpr int kRows = Vec::lanes == 16 ? 12 : 6;
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

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

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

// n things in the fewest blocks of at most `largest`, as even as can be.
struct Split {
  int64_t n, blocks;
  Split(int64_t n, int64_t largest) : n(n), blocks((n + largest - 1) / largest) {}
  int64_t begin(int64_t block) const { return block * n / blocks; }
  int64_t size(int64_t block) const { return begin(block + 1) - begin(block); }
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

// sums[r][c] += sum_k a[k * a_stride + r] * column(k, c): rows r are broadcast, columns c are vectors.
template <bool kPairs, int kR, int kC, class F>
FASTVIT_INLINE void product(int64_t depth, const float* a, int64_t a_stride, const F& column, Vec (&sums)[kR][kC]) {
  for (int64_t k = 0; k < depth; ++k, a += a_stride) {
    Vec columns[kC];
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) columns[c] = column(k, c);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const Vec row = Vec::fill(a[r]);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sums[r][c] = multiply_add<kPairs>(row, columns[c], sums[r][c]);
    }
  }
}

// out[r][c] = factor * sum_k a[k * kRows + r] * b[k][c] for rows r < kR and the kC vectors c of a row of b and of out.
template <bool kPairs, int kR, int kC>
FASTVIT_INLINE void product_to(int64_t depth, const float* a, const float* b, Vec factor, float* out) {
  for (int64_t first = 0; first < depth || first == 0; first += kPartialSum) {
    const int64_t terms = depth - first < kPartialSum ? depth - first : kPartialSum;
    const float* rows = b + first * kC * kLanes;
    Vec sums[kR][kC];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sums[r][c] = Vec::fill(0.0f);
    }
    product<kPairs>(
        terms, a + first * kRows, kRows, [&](int64_t k, int c) { return Vec::load(rows + (k * kC + c) * kLanes); },
        sums);
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

// out[d * stride + i] = word d of row i, for the rows i < count that row(i) gives; zeros up to a multiple of four rows.
template <class T, bool kPairs, class F>
inline void transpose_rows(int64_t count, int64_t dim, int64_t words, const F& row, float* out, int64_t stride) {
  float buffers[4][kHeadMixMaxDim];
  static constexpr float zeros[kHeadMixMaxDim] = {};
  for (int64_t first = 0; first < count; first += 4) {
    const float* rows[4];
    for (int64_t i = 0; i < 4; ++i) {
      rows[i] = first + i < count ? row_words<T, kPairs>(row(first + i), dim, buffers[i]) : zeros;
    }
    transpose4(rows, words, out + first, stride);
  }
}

// One batch element's packed keys and values. Words are 32 bits: floats, or (kPairs) two bfloat16.
// Keys of a head: panels of up to kRows keys, [panel][word of channels][key]; values of a head behind them: panels of
// up to kRows channels, [panel][word of keys][channel]. Every panel is kRows wide.
template <class T, bool kPairs>
struct Packed {
  int64_t dim, count;
  Split key_panels, value_panels;
  int64_t key_words, value_words;  // of a panel
  int64_t head_words;

  static int64_t words(int64_t elements) { return kPairs ? (elements + 1) / 2 : elements; }

  Packed(int64_t dim, int64_t count)
      : dim(dim),
        count(count),
        key_panels(count, kRows),
        value_panels(dim, kRows),
        key_words(words(dim) * kRows),
        value_words(words(count) * kRows),
        head_words(key_panels.blocks * key_words + value_panels.blocks * value_words) {}

  int64_t key_panel(int64_t head, int64_t panel) const { return head * head_words + panel * key_words; }
  int64_t value_panel(int64_t head, int64_t panel) const {
    return head * head_words + key_panels.blocks * key_words + panel * value_words;
  }
};

template <class T>
const T* head_of(const HeadMixOperand& operand, int64_t b, int64_t h) {
  return static_cast<const T*>(operand.data) + b * operand.batch_stride + h * operand.head_stride;
}

// Rows lie far apart, on pages of their own: asked for early, they do not arrive late.
template <int kForWriting = 0, class T>
inline void prefetch(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d, kForWriting);
}

template <class T, bool kPairs>
void pack_key_panel(const HeadMixParams& p, const Packed<T, kPairs>& layout, int64_t b, const int32_t* keys,
                    int64_t panel, float* packed) {
  constexpr int64_t kGroups = round_up(kRows, 4);  // of four keys are transposed at a time
  float wide[kHeadMixMaxDim * kGroups];
  const int64_t begin = layout.key_panels.begin(panel), count = layout.key_panels.size(panel);
  const int64_t words = layout.words(p.dim);
  const int64_t last_ahead = layout.count < begin + 2 * kRows ? layout.count : begin + 2 * kRows;
  for (int64_t h = 0; h < p.heads; ++h) {  // inside: the heads of a key lie side by side
    const T* k = head_of<T>(p.k, b, h);
    for (int64_t j = begin + count; j < last_ahead; ++j) prefetch(k + keys[j] * p.k.token_stride, p.dim);
    float* out = packed + layout.key_panel(h, panel);
    float* to = kGroups == kRows ? out : wide;
    transpose_rows<T, kPairs>(
        count, p.dim, words, [&](int64_t i) { return k + keys[begin + i] * p.k.token_stride; }, to, kGroups);
    if constexpr (kGroups != kRows) {
      for (int64_t d = 0; d < words; ++d) __builtin_memcpy(out + d * kRows, wide + d * kGroups, kRows * sizeof(float));
    }
  }
}

// Word `word` of the keys: one key, or two.
template <class T, bool kPairs>
void pack_value_row(const HeadMixParams& p, const Packed<T, kPairs>& layout, int64_t b, const int32_t* keys,
                    int64_t word, float* packed) {
  const int64_t j = kPairs ? 2 * word : word;
  constexpr int64_t kAhead = 8;
  float row[kHeadMixMaxDim + kRows];
  for (int64_t h = 0; h < p.heads; ++h) {
    const T* v = head_of<T>(p.v, b, h);
    const T* first = v + keys[j] * p.v.token_stride;
    if (j + kAhead < layout.count) prefetch(v + keys[j + kAhead] * p.v.token_stride, p.dim);
    if constexpr (kPairs) {
      const T* second = j + 1 < layout.count ? v + keys[j + 1] * p.v.token_stride : nullptr;
      for (int64_t d = 0; d < p.dim; ++d) row[d] = pair(first[d], second == nullptr ? bf16{0} : second[d]);
    } else {
      for (int64_t d = 0; d < p.dim; ++d) row[d] = to_float(first[d]);
    }
    for (int64_t panel = 0; panel < layout.value_panels.blocks; ++panel) {
      __builtin_memcpy(packed + layout.value_panel(h, panel) + word * kRows, row + layout.value_panels.begin(panel),
                       kRows * sizeof(float));  // a panel of fewer channels takes the next one's along
    }
  }
}

template <class T, bool kPairs>
void pack(const HeadMixParams& p, int64_t b, HeadMixKeys keys, int64_t part, int64_t parts, float* packed) {
  const Packed<T, kPairs> layout(p.dim, keys.count);
  const int64_t panels = layout.key_panels.blocks, words = layout.words(keys.count);
  for (int64_t panel = part * panels / parts; panel < (part + 1) * panels / parts; ++panel) {
    pack_key_panel(p, layout, b, keys.indices, panel, packed);
  }
  for (int64_t word = part * words / parts; word < (part + 1) * words / parts; ++word) {
    pack_value_row(p, layout, b, keys.indices, word, packed);
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
  static constexpr int64_t kWidth = kTileVectors * kLanes;
  static constexpr int kStagedKeys = 2;
  static constexpr int kPadding = 4;  // keys that a block of the mix may reach past the last

  int64_t map_stride;
  float* maps;      // [head][key][lane]: logits, then exponentials, then the finished map
  float* mask;      // [head or 1][key][lane]: +inf where attended to, -inf elsewhere
  float* inverse;   // [head][lane]: 1 / sum of exponentials
  float* staged;    // [head][key of a block of the mix][lane]
  float* channels;  // [head][channel][lane]: the queries, then the output

  // Heads are shifted against each other in the cache's sets.
  static int64_t stride_of(int64_t keys) { return (keys + kPadding) * kWidth + kLanes; }
  static int64_t mask_heads(const HeadMixParams& p) {
    return p.mask == nullptr ? 0 : p.mask_head_stride == 0 ? 1 : p.heads;
  }
  static int64_t floats(const HeadMixParams& p) {
    return (p.heads + mask_heads(p)) * stride_of(p.keys) + p.heads * kWidth + p.heads * kStagedKeys * kLanes +
           p.heads * round_up(p.dim, 4) * kWidth;
  }

  Scratch(const HeadMixParams& p, float* memory) : map_stride(stride_of(p.keys)), maps(memory) {
    mask = maps + p.heads * map_stride;
    inverse = mask + mask_heads(p) * map_stride;
    staged = inverse + p.heads * kWidth;
    channels = staged + p.heads * kStagedKeys * kLanes;
  }
};

template <class T, bool kPairs, int kV>  // kV vectors of queries
struct Tile {
  static constexpr int64_t kWidth = kV * kLanes;

  const HeadMixParams& p;
  const Scratch& s;
  int64_t b, first_query, queries;  // queries <= kWidth
  HeadMixKeys keys;
  const float* packed;
  const Packed<T, kPairs> layout{p.dim, keys.count};

  float* map(int64_t h) const { return s.maps + h * s.map_stride; }
  const float* mask(int64_t h) const { return p.mask_head_stride == 0 ? s.mask : s.mask + h * s.map_stride; }
  float* channels(int64_t h) const { return s.channels + h * round_up(p.dim, 4) * kWidth; }

  void run() const {
    if (p.mask != nullptr) expand_mask();
    load_queries();
    for (int64_t h = 0; h < p.heads; ++h) {
      logits(h);
      if (p.pre_weight == nullptr) softmax(h);  // while the map is hot
    }
    if (p.pre_weight != nullptr) {
      mix<false>(p.pre_weight, p.pre_bias);
      for (int64_t h = 0; h < p.heads; ++h) softmax(h);
    }
    if (p.post_weight != nullptr) {
      mix<true>(p.post_weight, p.post_bias);
    } else {
      finish_unmixed();
    }
    for (int64_t h = 0; h < p.heads; ++h) output(h);
    store_output();
  }

  void expand_mask() const {
    for (int64_t h = 0; h < Scratch::mask_heads(p); ++h) {
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t query = first_query + (i < queries ? i : 0);
        const bool* row = p.mask + b * p.mask_batch_stride + h * p.mask_head_stride + query * p.mask_query_stride;
        float* out = s.mask + h * s.map_stride + i;
        for (int64_t j = 0; j < keys.count; ++j) {
          out[j * kWidth] = row[keys.indices[j] * p.mask_key_stride] ? __builtin_inff() : -__builtin_inff();
        }
      }
    }
  }

  void load_queries() const {
    const int64_t words = layout.words(p.dim);
    for (int64_t first = 0; first < kWidth; first += 4) {
      const int64_t left = queries - first;
      for (int64_t h = 0; h < p.heads; ++h) {  // inside: the heads of a query lie side by side
        const T* q = head_of<T>(p.q, b, h) + (first_query + first) * p.q.token_stride;
        float* out = channels(h) + first;
        for (int64_t i = 8; i < 12 && i < left; ++i) prefetch(q + i * p.q.token_stride, p.dim);
        if (left > 0) {
          transpose_rows<T, kPairs>(
              left < 4 ? left : 4, p.dim, words, [&](int64_t i) { return q + i * p.q.token_stride; }, out, kWidth);
        } else {
          for (int64_t d = 0; d < words; ++d) __builtin_memset(out + d * kWidth, 0, 4 * sizeof(float));
        }
      }
    }
  }

  // S_h, all keys.
  void logits(int64_t h) const {
    const Vec scale = Vec::fill(p.scale);
    for (int64_t panel = 0; panel < layout.key_panels.blocks; ++panel) {
      const float* k = packed + layout.key_panel(h, panel);
      float* out = map(h) + layout.key_panels.begin(panel) * kWidth;
      with_constant<kRows>(layout.key_panels.size(panel), [&](auto rows) {
        product_to<kPairs, rows.value, kV>(layout.words(p.dim), k, channels(h), scale, out);
      });
    }
  }

  // exp(S_h - max) in place, and 1 / its sum over keys; a row with no key left gets zeros.
  void softmax(int64_t h) const {
    // With a mask, a row may have no key left; its largest logit must be finite for the difference to be.
    const float least = p.mask == nullptr ? -__builtin_inff() : -__FLT_MAX__;
    Vec largest[kV], sum[kV];
    for (int v = 0; v < kV; ++v) largest[v] = Vec::fill(least), sum[v] = Vec::fill(0.0f);
    for (int64_t j = 0; j < keys.count; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        float* at = map(h) + j * kWidth + v * kLanes;
        Vec x = Vec::load(at);
        if (p.mask != nullptr) {
          x = min(x, Vec::load(mask(h) + j * kWidth + v * kLanes));
          x.store(at);
        }
        largest[v] = max(x, largest[v]);
      }
    }
    for (int64_t j = 0; j < keys.count; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        float* at = map(h) + j * kWidth + v * kLanes;
        const Vec e = exp(Vec::load(at) - largest[v]);
        sum[v] += e;
        e.store(at);
      }
    }
    for (int v = 0; v < kV; ++v) {
      // The sum is zero only where every exponential is: any finite inverse will do.
      (Vec::fill(1.0f) / max(Vec::fill(__FLT_MIN__), sum[v])).store(s.inverse + h * kWidth + v * kLanes);
    }
  }

  // The maps become weight . maps + bias, in place. kFinish: exponentials become probabilities before, and the finished
  // map is stored as the product with v wants it.
  template <bool kFinish>
  void mix(const float* weight, const float* bias) const {
    if (p.heads > kRows) return mix_in_blocks<kFinish>(weight, bias);
    with_constant<kRows>(p.heads, [&](auto heads) {
      constexpr int kKeys = heads.value <= kRows / 2 ? 4 : 2;
      for (int64_t j = 0; j < keys.count; j += kKeys) {
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          mix_block<kFinish, heads.value, kKeys>(
              weight, bias, 0, j, v, [&](int64_t g, int key) { return probability<kFinish>(g, j + key, v); });
        }
      }
    });
  }

  // With more heads than a block has rows: several blocks from one copy of the columns.
  template <bool kFinish>
  void mix_in_blocks(const float* weight, const float* bias) const {
    constexpr int kKeys = Scratch::kStagedKeys;
    const Split blocks(p.heads, kRows);
    for (int64_t j = 0; j < keys.count; j += kKeys) {
      for (int v = 0; v < kV; ++v) {
        for (int64_t g = 0; g < p.heads; ++g) {
          for (int key = 0; key < kKeys; ++key) {
            probability<kFinish>(g, j + key, v).store(s.staged + (g * kKeys + key) * kLanes);
          }
        }
        for (int64_t block = 0; block < blocks.blocks; ++block) {
          with_constant<kRows>(blocks.size(block), [&](auto rows) {
            mix_block<kFinish, rows.value, kKeys>(weight, bias, blocks.begin(block), j, v, [&](int64_t g, int key) {
              return Vec::load(s.staged + (g * kKeys + key) * kLanes);
            });
          });
        }
      }
    }
  }

  // Heads h .. h + kR - 1 of the mix, for kKeys keys and vector v of the queries.
  template <bool kFinish, int kR, int kKeys, class F>
  FASTVIT_INLINE void mix_block(const float* weight, const float* bias, int64_t h, int64_t j, int v,
                                const F& column) const {
    Vec sums[kR][kKeys];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
      for (int key = 0; key < kKeys; ++key) sums[r][key] = Vec::fill(bias[h + r]);
    }
    product<false>(p.heads, weight + h, p.heads, column, sums);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) store_mixed<kFinish>(h + r, j, v, sums[r]);
  }

  template <bool kFinish>
  FASTVIT_INLINE Vec probability(int64_t h, int64_t j, int v) const {
    const Vec x = Vec::load(map(h) + j * kWidth + v * kLanes);
    return kFinish ? x * Vec::load(s.inverse + h * kWidth + v * kLanes) : x;
  }

  // Without a mix, the finished map is factor * P_h + bias.
  void finish_unmixed() const {
    for (int64_t h = 0; h < p.heads; ++h) {
      const Vec factor = Vec::fill(p.post_factor[h]), bias = Vec::fill(p.post_bias[h]);
      for (int64_t j = 0; j < keys.count; j += 2) {
        for (int v = 0; v < kV; ++v) {
          Vec finished[2];
          for (int key = 0; key < 2; ++key) finished[key] = fma(probability<true>(h, j + key, v), factor, bias);
          store_mixed<true>(h, j, v, finished);
        }
      }
    }
  }

  // Keys past the last land in the padding of the map; but a pair's second key that does not exist must be zero.
  template <bool kFinish, int kKeys>
  FASTVIT_INLINE void store_mixed(int64_t h, int64_t j, int v, Vec (&mixed)[kKeys]) const {
    if (kFinish && p.mask != nullptr) {
#pragma GCC unroll 8
      for (int key = 0; key < kKeys; ++key) {
        mixed[key] = where_attended(Vec::load(mask(h) + (j + key) * kWidth + v * kLanes), mixed[key]);
      }
    }
#if defined(__AVX512BF16__)
    if constexpr (kFinish && kPairs) {
      const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                  22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 8
      for (int key = 0; key < kKeys; key += 2) {
        const Vec second = j + key + 1 < keys.count ? mixed[key + 1] : Vec::fill(0.0f);
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second.v, mixed[key].v);
        float* out = map(h) + (j + key) / 2 * kWidth + v * kLanes;  // at or before what has been read
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(interleave, halves));
      }
      return;
    }
#endif
#pragma GCC unroll 8
    for (int key = 0; key < kKeys; ++key) mixed[key].store(map(h) + (j + key) * kWidth + v * kLanes);
  }

  // M_h v_h, all channels.
  void output(int64_t h) const {
    for (int64_t panel = 0; panel < layout.value_panels.blocks; ++panel) {
      const float* v = packed + layout.value_panel(h, panel);
      float* out = channels(h) + layout.value_panels.begin(panel) * kWidth;
      with_constant<kRows>(layout.value_panels.size(panel), [&](auto rows) {
        product_to<kPairs, rows.value, kV>(layout.words(keys.count), v, map(h), Vec::fill(1.0f), out);
      });
    }
  }

  void store_output() const {
    T* out = static_cast<T*>(p.out) + (b * p.queries + first_query) * p.heads * p.dim;
    for (int64_t i = 0; i < queries; i += 4) {
      for (int64_t h = 0; h < p.heads; ++h) store_rows(h, i, out + (i * p.heads + h) * p.dim);
    }
  }

  // Queries i .. i + 3, as far as they exist, of head h.
  void store_rows(int64_t h, int64_t i, T* out) const {
    float buffer[4 * kHeadMixMaxDim];
    const int64_t left = queries - i, rows = left < 4 ? left : 4, stride = p.heads * p.dim;
    for (int64_t k = 4; k < 8 && k < left; ++k) prefetch<1>(out + k * stride, p.dim);
    for (int64_t d = 0; d < p.dim; d += 4) {
      const float* in[4];
      for (int64_t k = 0; k < 4; ++k) in[k] = channels(h) + (d + k) * kWidth + i;
      transpose4(in, 4, buffer + d, kHeadMixMaxDim);
    }
    for (int64_t k = 0; k < rows; ++k) {
      const float* row = buffer + k * kHeadMixMaxDim;
      int64_t d = 0;
      for (; d + kLanes <= p.dim; d += kLanes) Vec::load(row + d).store(out + k * stride + d);
      if (d < p.dim) Vec::load(row + d, p.dim - d).store(out + k * stride + d, p.dim - d);
    }
  }
};

template <class T, bool kPairs>
void attend(const HeadMixParams& p, int64_t b, int64_t begin, int64_t end, HeadMixKeys keys, const float* packed,
            float* memory) {
  const Scratch scratch(p, memory);
  for (int64_t query = begin; query < end;) {
    const int64_t left = end - query;
    if (left > kLanes) {
      Tile<T, kPairs, 2>{p, scratch, b, query, left < 2 * kLanes ? left : 2 * kLanes, keys, packed}.run();
      query += 2 * kLanes;
    } else {
      Tile<T, kPairs, 1>{p, scratch, b, query, left, keys, packed}.run();
      query += kLanes;
    }
  }
}

template <class T, bool kPairs>
HeadMixKernel make_kernel(const HeadMixParams& p) {
  return {kLanes, p.heads * Packed<T, kPairs>(p.dim, p.keys).head_words, Scratch::floats(p), pack<T, kPairs>,
          attend<T, kPairs>};
}

}  // namespace

HeadMixKernel head_mix_kernel(const HeadMixParams& p) {
  return p.bfloat16 ? make_kernel<bf16, kHasPairs>(p) : make_kernel<float, false>(p);
}

}  // namespace fastvit::FASTVIT_ISA
