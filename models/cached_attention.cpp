// Attention of a few new tokens over a KV cache, in bf16, for CPUs with AVX512-BF16.
//
// `models/cached_attention.py` compiles this file, with -DHEAD_DIM=d, and says what it computes.
//
// One head of one row is one task. Its queries lie across the 16 lanes of a register, one query
// per lane, so that a key is read once for all of them and a softmax needs no sums across lanes.
// A product of bf16 takes pairs: acc += a[0] b[0] + a[1] b[1] in every lane.

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifndef __AVX512BF16__
#error "this CPU has no AVX512-BF16"
#endif

namespace {

using bf16 = std::uint16_t;
using pair = std::uint32_t;  // two neighbouring bf16
using std::int64_t;

constexpr int D = HEAD_DIM, PAIRS = D / 2, LANES = 16;
constexpr int KEYS = 16;    // keys whose scores are summed at the same time, each in a register
constexpr int QUERIES = 8;  // queries whose outputs are, each in two
constexpr int CHUNK = 32;   // numbers of a value that one register holds
constexpr float INF = std::numeric_limits<float>::infinity();
static_assert(D % CHUNK == 0, "halves of a head are read in whole registers");

// What a thread needs for one head: as many as there are keys, rounded up to whole registers.
struct Scratch {
  explicit Scratch(int64_t seen)
      : scores(static_cast<float*>(_mm_malloc((seen + KEYS) * LANES * sizeof(float), 64))),
        weights(static_cast<pair*>(_mm_malloc((seen / 2 + 1) * LANES * sizeof(pair), 64))) {}
  ~Scratch() { _mm_free(scores), _mm_free(weights); }
  Scratch(const Scratch&) = delete;

  float* scores;  // (keys, LANES)
  pair* weights;  // (keys / 2, LANES): two keys' softmax weights of a query side by side
};

__m512 as_floats(const bf16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void store_rounded(bf16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

__m512bh broadcast(const pair* x) { return (__m512bh)_mm512_set1_epi32(*x); }

// e^x for x <= 0, to 1e-6 of its value: 2^n times a polynomial in what is left of x / log 2.
__m512 exp_of_negative(__m512 x) {
  const __m512 y = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-200.f)), _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(y, n);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// Rotary embedding: the pairs (x_i, x_{i + d/2}) turned by the angles of the token.
void rotate(bf16* to, const bf16* x, const float* cos, const float* sin) {
  for (int i = 0; i < D / 2; i += LANES) {
    const __m512 a = as_floats(x + i), b = as_floats(x + i + D / 2);
    const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
    store_rounded(to + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    store_rounded(to + i + D / 2, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
}

// Scores of up to 16 queries, whose pairs lie across lanes, with all keys. `visible` has a bit per
// query for each of the `num_new` keys from `first_new` on. Returns each query's highest score.
__m512 score(const pair (&queries)[PAIRS][LANES], const bf16* keys, const bf16* values, int64_t seen,
             int64_t first_new, int64_t num_new, const std::uint16_t* visible, float* scores) {
  const __m512 scale = _mm512_set1_ps(1.f / __builtin_sqrtf(D));
  __m512 highest = _mm512_set1_ps(-INF);
  for (int64_t first = 0; first < seen; first += KEYS) {
    alignas(64) bf16 last[KEYS * D];
    const bf16* tile = keys + first * D;
    const int64_t size = seen - first < KEYS ? seen - first : KEYS;
    if (size < KEYS) {  // what lies behind the last key may not be ours
      std::memset(last, 0, sizeof last);
      tile = static_cast<bf16*>(std::memcpy(last, tile, size * D * sizeof(bf16)));
    }
    // The values come next, and memory is slower than the products here.
    for (int i = 0; i < KEYS * D; i += CHUNK) _mm_prefetch(values + first * D + i, _MM_HINT_T1);
    const pair* key = reinterpret_cast<const pair*>(tile);
    __m512 sums[KEYS] = {};
#pragma GCC unroll 4
    for (int p = 0; p < PAIRS; p++) {
      const auto query = (__m512bh)_mm512_load_si512(queries[p]);
#pragma GCC unroll 16
      for (int k = 0; k < KEYS; k++)
        sums[k] = _mm512_dpbf16_ps(sums[k], query, broadcast(key + k * PAIRS + p));
    }
    for (int k = 0; k < size; k++) {
      const int64_t which = first + k - first_new;
      __m512 scaled = _mm512_mul_ps(sums[k], scale);
      if (visible && which >= 0 && which < num_new)
        scaled = _mm512_mask_mov_ps(_mm512_set1_ps(-INF), visible[which], scaled);
      highest = _mm512_max_ps(highest, scaled);
      _mm512_store_ps(scores + (first + k) * LANES, scaled);
    }
  }
  return highest;
}

// e^(score - highest) as pairs of keys, and the sum of it for each query.
__m512 weigh(const Scratch& scratch, int64_t seen, __m512 highest) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < seen; k += 2) {
    const float* scores = scratch.scores + k * LANES;
    const __m512 a = exp_of_negative(_mm512_sub_ps(_mm512_load_ps(scores), highest));
    __m512 b = _mm512_setzero_ps();
    if (k + 1 < seen)
      b = exp_of_negative(_mm512_sub_ps(_mm512_load_ps(scores + LANES), highest));
    sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
    const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    _mm512_store_si512(scratch.weights + k / 2 * LANES, both);
  }
  return sum;
}

// Weighted means of the values for each of `num` queries, to rows of `out`.
void average(const pair* weights, const bf16* values, int64_t seen, __m512 sum, int num, bf16* out,
             int64_t row_stride, const bf16* next_keys) {
  alignas(64) float inverse[LANES];
  _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1.f), sum));
  // Two rows of values become pairs by unpacking, which takes every other four numbers.
  const __m512i lower = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i upper = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  for (int d = 0; d < D; d += CHUNK) {
    for (int first = 0; first < num; first += QUERIES) {
      __m512 evens[QUERIES] = {}, odds[QUERIES] = {};
      for (int64_t k = 0; k < seen; k += 2) {
        if (d + first == 0)  // the first time through: what the next task reads first
          for (int i = 0; i < 2 * D; i += CHUNK) _mm_prefetch(next_keys + k * D + i, _MM_HINT_T1);
        const __m512i a = _mm512_loadu_si512(values + k * D + d);
        __m512i b = _mm512_setzero_si512();
        if (k + 1 < seen) b = _mm512_loadu_si512(values + (k + 1) * D + d);
        const auto even = (__m512bh)_mm512_unpacklo_epi16(a, b);
        const auto odd = (__m512bh)_mm512_unpackhi_epi16(a, b);
        const pair* weight = weights + k / 2 * LANES + first;
#pragma GCC unroll 8
        for (int q = 0; q < QUERIES; q++) {
          evens[q] = _mm512_dpbf16_ps(evens[q], even, broadcast(weight + q));
          odds[q] = _mm512_dpbf16_ps(odds[q], odd, broadcast(weight + q));
        }
      }
      for (int q = 0; q < QUERIES && first + q < num; q++) {
        const __m512 scale = _mm512_set1_ps(inverse[first + q]);
        const auto even = _mm512_castps_pd(_mm512_mul_ps(evens[q], scale));
        const auto odd = _mm512_castps_pd(_mm512_mul_ps(odds[q], scale));
        bf16* row = out + (first + q) * row_stride + d;
        store_rounded(row, _mm512_castpd_ps(_mm512_permutex2var_pd(even, lower, odd)));
        store_rounded(row + LANES, _mm512_castpd_ps(_mm512_permutex2var_pd(even, upper, odd)));
      }
    }
  }
}

}  // namespace

// qkv (B, T, 3, H, d); keys, values: the buffers' first head, whose heads are `head_stride` numbers
// apart; out (B, T, H, d); cos, sin (B or 1, T, d / 2), `angle_stride` from row to row; own (T, T)
// or null: which of the new keys a query sees. Writes the T new tokens at `first_new`, and attends
// to the first `seen`.
extern "C" void cached_attention(const bf16* qkv, bf16* keys, bf16* values, bf16* out,
                                 const float* cos, const float* sin, const std::uint8_t* own,
                                 int64_t num_rows, int64_t num_heads, int64_t num_new, int64_t first_new,
                                 int64_t seen, int64_t head_stride, int64_t angle_stride,
                                 int64_t num_threads) {
  const int64_t part = num_heads * D, token = 3 * part;
#pragma omp parallel num_threads(num_threads)
  {
    const Scratch scratch(seen);
    std::vector<std::uint16_t> visible(num_new);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < num_rows * num_heads; task++) {
      const int64_t row = task / num_heads, head = task % num_heads;
      const bf16* x = qkv + row * num_new * token + head * D;
      const float *row_cos = cos + row * angle_stride, *row_sin = sin + row * angle_stride;
      bf16 *own_keys = keys + task * head_stride, *own_values = values + task * head_stride;
      for (int64_t t = 0; t < num_new; t++) {
        const bf16* k = x + t * token + part;
        rotate(own_keys + (first_new + t) * D, k, row_cos + t * (D / 2), row_sin + t * (D / 2));
        std::memcpy(own_values + (first_new + t) * D, k + part, D * sizeof(bf16));
      }
      for (int64_t first = 0; first < num_new; first += LANES) {
        const int num = num_new - first < LANES ? num_new - first : LANES;
        alignas(64) pair queries[PAIRS][LANES] = {};
        for (int q = 0; q < num; q++) {
          pair turned[PAIRS];
          const int64_t t = first + q;
          rotate(reinterpret_cast<bf16*>(turned), x + t * token, row_cos + t * (D / 2), row_sin + t * (D / 2));
          for (int p = 0; p < PAIRS; p++) queries[p][q] = turned[p];
        }
        for (int64_t k = 0; own && k < num_new; k++) {
          visible[k] = 0;
          for (int q = 0; q < num; q++) visible[k] |= (own[(first + q) * num_new + k] != 0) << q;
        }
        const __m512 highest = score(queries, own_keys, own_values, seen, first_new, num_new,
                                     own ? visible.data() : nullptr, scratch.scores);
        const __m512 sum = weigh(scratch, seen, highest);
        bf16* to = out + (row * num_new + first) * part + head * D;
        average(scratch.weights, own_values, seen, sum, num, to, part, own_keys + head_stride);
      }
    }
  }
}
