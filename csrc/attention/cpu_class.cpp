// Attention of a few queries, such as class tokens, forward and backward; compiled once per instruction set.
//
// There are too few queries to fill the lanes of a vector. Keys and values are read once, in place:
//   S[j] = scale sum_d k[j][d] q[d] + bias[j]     lanes are channels; the sums of as many keys as there are lanes are
//                                                 reduced to one vector
//   P[j] = exp(S[j] - max)                        lanes are keys
//   out[d] = sum_j P[j] v[j][d] / sum_j P[j]      lanes are channels
// The keys of a head may be split between threads: each part has its own maximum, and is multiplied by
// exp(own max - max) when the parts are combined. The backward pass (formulas in cpu_masked_backward.cpp) consists of
// products of the same three kinds.
#include "attention/args_class.h"

#include "attention/cpu_bias.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t kChunk = 64;  // keys per partial sum of weighted rows

// Lane i is the sum of the lanes of x[i].
FASTVIT_INLINE Vec sums_of(const Vec (&x)[kLanes]) {
#if defined(__AVX512F__)
  const auto pairs = [](Vec a, Vec b) {
    return Vec{_mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v))};
  };
  const auto fours = [](Vec a, Vec b) {
    return Vec{_mm512_add_ps(_mm512_shuffle_ps(a.v, b.v, 0x44), _mm512_shuffle_ps(a.v, b.v, 0xee))};
  };
  const auto quarters = [](Vec a, Vec b) {
    return Vec{_mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x88), _mm512_shuffle_f32x4(a.v, b.v, 0xdd))};
  };
  Vec four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) four[i] = fours(pairs(x[4 * i], x[4 * i + 1]), pairs(x[4 * i + 2], x[4 * i + 3]));
  return quarters(quarters(four[0], four[1]), quarters(four[2], four[3]));
#elif defined(__AVX2__)
  const auto fours = [&](int i) {
    return _mm256_hadd_ps(_mm256_hadd_ps(x[i].v, x[i + 1].v), _mm256_hadd_ps(x[i + 2].v, x[i + 3].v));
  };
  const __m256 low = fours(0), high = fours(4);
  return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))};
#elif defined(FASTVIT_NEON)
  const auto two = [&](int i) {
    return vpaddq_f32(vaddq_f32(x[i].low, x[i].high), vaddq_f32(x[i + 1].low, x[i + 1].high));
  };
  return {vpaddq_f32(two(0), two(2)), vpaddq_f32(two(4), two(6))};
#else
  Vec result = Vec::fill(0.0f);
  for (int64_t i = 0; i < kLanes; ++i) result.v[i] = sum(x[i]);
  return result;
#endif
}

// out[i][j] = factor * (row j of the list . row i of `with`), for padded rows `with`; lanes beyond the last key repeat
// it.
template <class T>
void dot_rows(Rows<T> rows, AttentionKeys keys, int64_t dim, const float* with, int64_t count, float factor, float* out,
              int64_t out_stride) {
  const int64_t width = padded(dim), whole = dim / kLanes * kLanes, rest = dim - whole;
  for (int64_t first = 0; first < keys.count; first += kLanes) {
    const T* row[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      row[r] = rows[keys.indices[first + r < keys.count ? first + r : keys.count - 1]];
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* one = with + i * width;
      Vec sums[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) sums[r] = Vec::fill(0.0f);
      for (int64_t d = 0; d < whole; d += kLanes) {
        const Vec channels = Vec::load(one + d);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) sums[r] = fma(Vec::load(row[r] + d), channels, sums[r]);
      }
      if (rest > 0) {
        const Vec channels = Vec::load(one + whole);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) sums[r] = fma(Vec::load(row[r] + whole, rest), channels, sums[r]);
      }
      (sums_of(sums) * Vec::fill(factor)).store(out + i * out_stride + first);
    }
  }
}

// out[c] += sum_j weights[j] * vector c of row j, for kC vectors, of `rest` lanes if rest > 0.
template <int kC, class T>
FASTVIT_INLINE void add_rows(Rows<T> rows, AttentionKeys keys, int64_t offset, int64_t rest, const float* weights,
                             float* out) {
  Vec even[kC], odd[kC];
#pragma GCC unroll 4
  for (int c = 0; c < kC; ++c) even[c] = odd[c] = Vec::fill(0.0f);
  const auto add = [&](int64_t j, Vec(&sums)[kC]) {
    const T* row = rows[keys.indices[j]] + offset;
    const Vec weight = Vec::fill(weights[j]);
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      const Vec values = rest > 0 ? Vec::load(row + c * kLanes, rest) : Vec::load(row + c * kLanes);
      sums[c] = fma(weight, values, sums[c]);
    }
  };
  int64_t j = 0;
  for (; j + 2 <= keys.count; j += 2) add(j, even), add(j + 1, odd);
  if (j < keys.count) add(j, even);
#pragma GCC unroll 4
  for (int c = 0; c < kC; ++c) (Vec::load(out + c * kLanes) + (even[c] + odd[c])).store(out + c * kLanes);
}

// out[i] = sum_j weights[i][j] * row j of the list, a padded row.
template <class T>
void sum_weighted_rows(Rows<T> rows, AttentionKeys keys, int64_t dim, const float* weights, int64_t weights_stride,
                       int64_t count, float* out) {
  const int64_t width = padded(dim), whole = dim / kLanes, rest = dim % kLanes;
  __builtin_memset(out, 0, count * width * sizeof(float));
  for (int64_t first = 0; first < keys.count; first += kChunk) {
    const AttentionKeys chunk{keys.indices + first, keys.count - first < kChunk ? keys.count - first : kChunk};
    for (int64_t i = 0; i < count; ++i) {
      const float* of_chunk = weights + i * weights_stride + first;
      for (int64_t c = 0; c < whole; c += 4) {
        with_constant<4>(whole - c < 4 ? whole - c : 4, [&](auto vectors) {
          add_rows<vectors.value>(rows, chunk, c * kLanes, 0, of_chunk, out + i * width + c * kLanes);
        });
      }
      if (rest > 0) add_rows<1>(rows, chunk, whole * kLanes, rest, of_chunk, out + i * width + whole * kLanes);
    }
  }
}

template <class T>
void load_rows(Rows<T> rows, int64_t count, int64_t dim, float* out) {
  const int64_t width = padded(dim);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < dim; d += kLanes) load(rows[i] + d, smaller(kLanes, dim - d)).store(out + i * width + d);
  }
}

template <class T>
void store_row(const float* row, Vec factor, int64_t dim, T* out) {
  for (int64_t d = 0; d < dim; d += kLanes) store(Vec::load(row + d) * factor, out + d, smaller(kLanes, dim - d));
}

// Adds the bias to the logits of query i; those of hidden keys become -inf, whatever they are.
template <class T>
void limit_logits(Sight<T> sight, int64_t i, AttentionKeys keys, float* logits) {
  const MaskedAttentionParams& p = sight.p;
  if (p.bias != nullptr) {
    const T* row = sight.bias_row(i);
    for (int64_t j = 0; j < keys.count; ++j) {
      const float bias = widen(row[keys.indices[j] * p.bias_key_stride]);
      logits[j] = bias == -__builtin_inff() ? bias : logits[j] + bias;
    }
  }
  if (p.mask != nullptr) {
    const bool* row = sight.mask_row(i);
    for (int64_t j = 0; j < keys.count; ++j) {
      if (!row[keys.indices[j] * p.mask_key_stride]) logits[j] = -__builtin_inff();
    }
  }
}

// The logits of one query become exponentials, those beyond the last key zeros; with their maximum and sum.
FASTVIT_INLINE void exponentials(float* map, int64_t count, float* maximum, float* total) {
  for (int64_t j = count; j < padded(count); ++j) map[j] = -__builtin_inff();
  Vec most = Vec::fill(-__FLT_MAX__);  // finite, so that logit - maximum is, even without a key
  for (int64_t j = 0; j < count; j += kLanes) most = max(Vec::load(map + j), most);
  *maximum = largest(most);
  Vec parts = Vec::fill(0.0f);
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec e = exp_nonpositive(Vec::load(map + j) - Vec::fill(*maximum));
    e.store(map + j);
    parts += e;
  }
  *total = sum(parts);
}

// Query i's part of a map becomes zero where keys are hidden from it.
template <class T>
void clear_hidden(Sight<T> sight, int64_t i, AttentionKeys keys, float* map) {
  for (int64_t j = 0; j < keys.count; ++j) {
    if (!sight.sees(i, keys.indices[j])) map[j] = 0.0f;
  }
}

// sum_weighted_rows again without hidden keys, where what is not finite in their rows has made a result NaN.
template <class T>
void weigh_visible(Sight<T> sight, Rows<T> rows, AttentionKeys keys, int64_t dim, const float* weights,
                   int64_t weights_stride, int64_t count, float* out) {
  const int64_t width = padded(dim);
  if (!can_hide(sight.p) || !has_nan(out, count * width)) return;
  for (int64_t i = 0; i < count; ++i) {
    double sums[kAttentionMaxDim] = {};
    for (int64_t j = 0; j < keys.count; ++j) {
      if (!sight.sees(i, keys.indices[j])) continue;
      const T* row = rows[keys.indices[j]];
      for (int64_t d = 0; d < dim; ++d) sums[d] += double{weights[i * weights_stride + j]} * double{widen(row[d])};
    }
    for (int64_t d = 0; d < dim; ++d) out[i * width + d] = static_cast<float>(sums[d]);
  }
}

// The result for a part of the keys: maximum (-inf for a query that sees keys, all with logits of -inf) and sum of
// every query, then the weighted values, not yet divided.
struct Partial {
  static int64_t floats(const AttentionParams& p) { return p.queries * (2 + padded(p.dim)); }
  static const float* values(const AttentionParams& p, const float* partial) { return partial + 2 * p.queries; }
};

int64_t map_floats(const AttentionParams& p) { return p.queries * padded(p.keys); }
int64_t row_floats(const AttentionParams& p) { return p.queries * padded(p.dim); }

template <class T>
void attend(const MaskedAttentionParams& p, int64_t problem, AttentionKeys keys, float* partial, float* scratch) {
  const int64_t b = problem / p.heads, h = problem % p.heads, stride = padded(p.keys);
  float *map = scratch, *queries = map + map_floats(p);
  load_rows(Rows<T>(p.q, b, h), p.queries, p.dim, queries);
  dot_rows(Rows<T>(p.k, b, h), keys, p.dim, queries, p.queries, p.scale, map, stride);
  const Sight<T> sight{p, b, h};
  for (int64_t i = 0; i < p.queries; ++i) {
    float &maximum = partial[2 * i], &total = partial[2 * i + 1];
    limit_logits(sight, i, keys, map + i * stride);
    exponentials(map + i * stride, keys.count, &maximum, &total);
    if (total == 0.0f && sight.sees_any(i, keys)) maximum = -__builtin_inff();
  }
  const Rows<T> v(p.v, b, h);
  sum_weighted_rows(v, keys, p.dim, map, stride, p.queries, partial + 2 * p.queries);
  weigh_visible(sight, v, keys, p.dim, map, stride, p.queries, partial + 2 * p.queries);
}

// 1 / total; of zero, any finite number where no key is seen, and NaN where those seen have logits of -inf.
FASTVIT_INLINE Vec inverse_sum(float total, bool infinite) {
  if (total == 0.0f && infinite) return Vec::fill(__builtin_nanf(""));
  return Vec::fill(1.0f) / max(Vec::fill(__FLT_MIN__), Vec::fill(total));
}

template <class T>
void combine(const MaskedAttentionParams& p, int64_t problem, const float* partials, int64_t parts, int64_t floats) {
  const int64_t b = problem / p.heads, h = problem % p.heads, width = padded(p.dim);
  for (int64_t i = 0; i < p.queries; ++i) {
    T* out = static_cast<T*>(p.out) + ((b * p.queries + i) * p.heads + h) * p.dim;
    const float* values = Partial::values(p, partials) + i * width;
    bool infinite = false;  // whether a part sees keys whose logits are all -inf
    for (int64_t part = 0; part < parts; ++part) infinite |= partials[part * floats + 2 * i] == -__builtin_inff();
    if (parts == 1) {
      store_row(values, inverse_sum(partials[2 * i + 1], infinite), p.dim, out);
      continue;
    }
    Vec most = Vec::fill(-__FLT_MAX__), total = Vec::fill(0.0f);
    for (int64_t part = 0; part < parts; ++part) most = max(Vec::fill(partials[part * floats + 2 * i]), most);
    float sums[kAttentionMaxDim] = {};
    for (int64_t part = 0; part < parts; ++part) {
      const float* of_part = partials + part * floats + 2 * i;
      const Vec weight = exp_nonpositive(Vec::fill(of_part[0]) - most);
      total = fma(weight, Vec::fill(of_part[1]), total);
      for (int64_t d = 0; d < width; d += kLanes) {
        fma(weight, Vec::load(values + part * floats + d), Vec::load(sums + d)).store(sums + d);
      }
    }
    store_row(sums, inverse_sum(largest(total), infinite), p.dim, out);
  }
}

// --- Backward --------------------------------------------------------------------------------------------------------

// out = factor * sum_i weights[i] * rows[i], over the queries that take part.
template <class T, class Takes>
FASTVIT_INLINE void store_sum(int64_t queries, const Takes& takes_part, const float* weights, int64_t weights_stride,
                              const float* rows, float factor, int64_t dim, T* out) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    Vec sum = Vec::fill(0.0f);
    for (int64_t i = 0; i < queries; ++i) {
      if (!takes_part(i)) continue;
      sum = fma(Vec::fill(weights[i * weights_stride]), Vec::load(rows + i * padded(dim) + d), sum);
    }
    store(sum * Vec::fill(factor), out + d, smaller(kLanes, dim - d));
  }
}

template <class T>
void attend_backward(const MaskedAttentionGradients& p, int64_t problem, AttentionKeys keys, float* scratch) {
  const int64_t b = problem / p.heads, h = problem % p.heads, stride = padded(p.keys), token = p.heads * p.dim;
  float *map = scratch, *gradient = map + map_floats(p), *queries = gradient + map_floats(p);
  float *outputs = queries + row_floats(p), *sums = outputs + row_floats(p);
  load_rows(Rows<T>(p.q, b, h), p.queries, p.dim, queries);
  load_rows(Rows<T>(p.grad, b, h), p.queries, p.dim, outputs);
  dot_rows(Rows<T>(p.k, b, h), keys, p.dim, queries, p.queries, p.scale, map, stride);
  dot_rows(Rows<T>(p.v, b, h), keys, p.dim, outputs, p.queries, 1.0f, gradient, stride);
  const Sight<T> sight{p, b, h};
  const bool hides = can_hide(p);
  for (int64_t i = 0; i < p.queries; ++i) {
    float *row = map + i * stride, *of_row = gradient + i * stride, maximum, total;
    limit_logits(sight, i, keys, row);
    exponentials(row, keys.count, &maximum, &total);
    const Vec inverse = inverse_sum(total, total == 0.0f && sight.sees_any(i, keys));
    for (int64_t j = keys.count; j < padded(keys.count); ++j) of_row[j] = 0.0f;
    const auto find_dot = [&] {
      Vec dots = Vec::fill(0.0f);
      for (int64_t j = 0; j < keys.count; j += kLanes) dots = fma(Vec::load(row + j), Vec::load(of_row + j), dots);
      return Vec::fill(sum(dots)) / max(Vec::fill(__FLT_MIN__), Vec::fill(total));
    };
    Vec dot = find_dot();
    if (hides && any_nan(dot)) {
      clear_hidden(sight, i, keys, of_row);
      dot = find_dot();
    }
    for (int64_t j = 0; j < keys.count; j += kLanes) {
      const Vec probability = Vec::load(row + j) * inverse;
      probability.store(row + j);
      (probability * (Vec::load(of_row + j) - dot)).store(of_row + j);
    }
    if (hides && !(all_finite(dot) && all_finite(inverse))) {
      clear_hidden(sight, i, keys, row);
      clear_hidden(sight, i, keys, of_row);
    }
  }
  const Rows<T> k(p.k, b, h);
  sum_weighted_rows(k, keys, p.dim, gradient, stride, p.queries, sums);
  weigh_visible(sight, k, keys, p.dim, gradient, stride, p.queries, sums);
  T* dq = static_cast<T*>(p.dq) + b * p.queries * token + h * p.dim;
  for (int64_t i = 0; i < p.queries; ++i) {
    store_row(sums + i * padded(p.dim), Vec::fill(p.scale), p.dim, dq + i * token);
  }
  T* dk = static_cast<T*>(p.dk) + b * p.keys * token + h * p.dim;
  T* dv = static_cast<T*>(p.dv) + b * p.keys * token + h * p.dim;
  // A query whose row is not finite must be left out of the sums of the keys hidden from it.
  bool finite = true;
  for (int64_t i = 0; hides && i < p.queries; ++i) {
    finite &= is_finite(Rows<T>(p.q, b, h)[i], p.dim) && is_finite(Rows<T>(p.grad, b, h)[i], p.dim);
  }
  for (int64_t key = 0, j = 0; key < p.keys; ++key) {
    if (j < keys.count && keys.indices[j] == key) {
      const auto store_sums = [&](const auto& takes_part) __attribute__((always_inline)) {
        store_sum(p.queries, takes_part, gradient + j, stride, queries, p.scale, p.dim, dk + key * token);
        store_sum(p.queries, takes_part, map + j, stride, outputs, 1.0f, p.dim, dv + key * token);
      };
      if (finite) {
        store_sums([](int64_t) { return true; });
      } else {
        store_sums([&](int64_t i) { return sight.sees(i, key); });
      }
      ++j;
    } else {
      __builtin_memset(dk + key * token, 0, p.dim * sizeof(T));
      __builtin_memset(dv + key * token, 0, p.dim * sizeof(T));
    }
  }
}

}  // namespace

ClassAttentionKernel class_attention_kernel(const MaskedAttentionParams& p) {
  const int64_t scratch = map_floats(p) + row_floats(p);
  return with_element<true>(
      p.element, [&]<class T>() { return ClassAttentionKernel{Partial::floats(p), scratch, attend<T>, combine<T>}; });
}

ClassAttentionBackwardKernel class_attention_backward_kernel(const MaskedAttentionParams& p) {
  const int64_t scratch = 2 * map_floats(p) + 3 * row_floats(p);
  return with_element(p.element, [&]<class T>() { return ClassAttentionBackwardKernel{scratch, attend_backward<T>}; });
}

}  // namespace fastvit::FASTVIT_ISA
