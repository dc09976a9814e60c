// Attention of a few new tokens over a KV cache, in bf16, for CPUs with AVX512-BF16.
//
// `models/cached_attention.py` compiles this file, with -DHEAD_DIM=d, and says what it computes.
//
// One head of one row is one task. Its queries lie across the 16 lanes of a register, one query per
// lane, so that a key is read once for all of them and a softmax needs no sums across lanes. A
// product of bf16 takes pairs: in every lane acc += a[0] b[0] + a[1] b[1].
//
// Memory is slower than the products. So keys and values are read once, in blocks that fit the
// first-level cache, with the running softmax of Milakov and Gimelshein (arXiv 1805.02867); and
// while one block is multiplied, a line at a time is asked for of the next.

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>

#ifndef __AVX512BF16__
#error "this CPU has no AVX512-BF16"
#endif

namespace {

using bf16 = std::uint16_t;
using pair = std::uint32_t;  // two neighbouring bf16
using std::int64_t;

constexpr int D = HEAD_DIM, PAIRS = D / 2, LANES = 16;
constexpr int BLOCK = 64;  // keys between two updates of the running softmax
constexpr int KEYS = 16;    // keys whose scores are summed at the same time, each in a register
constexpr int QUERIES = 8;  // queries whose outputs are, each in two
constexpr int WIDTH = 32;   // bf16 numbers in a register, and in a line of the cache
// Of what a query must not see: so low that its weight is 0, yet not infinite, so that differences
// are numbers.
constexpr float HIDDEN = -1e30f;
static_assert(D % WIDTH == 0, "halves of a head are read in whole registers");

__m512 as_floats(const bf16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void store_rounded(bf16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

void ask_for(const bf16* x) { _mm_prefetch(reinterpret_cast<const char*>(x), _MM_HINT_T0); }

__m512bh broadcast(const pair* x) { return (__m512bh)_mm512_set1_epi32(*x); }

// 2^x to 4e-6 of its value: a power of two times a polynomial in what is left of x.
__m512 exp2_of(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, n);
  __m512 sum = _mm512_set1_ps(9.570186e-3f);
  for (float c : {5.5867674e-2f, 2.4024098e-1f, 6.9312525e-1f, 9.9999994e-1f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(c));
  return _mm512_scalef_ps(sum, n);
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

// Up to 16 queries, and the softmax over the keys they have met so far.
struct alignas(64) Tile {
  pair queries[PAIRS][LANES];
  float highest[LANES], sum[LANES];
  // sum of weight times value, for each query: of a register of values the numbers 0-3, 8-11, ..
  // and then the others, as unpacking leaves them
  float averages[D / WIDTH][LANES][2][LANES];
  int num_queries;

  void start(int num) {
    std::memset(this, 0, sizeof *this);
    for (float& x : highest) x = HIDDEN;
    num_queries = num;
  }

  void set_query(int lane, const pair* query) {
    for (int p = 0; p < PAIRS; p++) queries[p][lane] = query[p];
  }

  // Meet `size` keys. `visible` has a bit per query for each of them, or is null: all see all.
  // `next_keys` are those that come after them.
  void meet(const bf16* keys, const bf16* values, int size, const std::uint16_t* visible,
            const bf16* next_keys) {
    alignas(64) float scores[BLOCK * LANES];
    alignas(64) pair weights[BLOCK / 2 * LANES];
    const __m512 before = _mm512_load_ps(highest);
    const __m512 now = score(keys, values, size, visible, before, scores);
    const __m512 scale = exp2_of(_mm512_sub_ps(before, now));
    const __m512 new_sum = weigh(scores, size, now, weights);
    _mm512_store_ps(highest, now);
    _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_load_ps(sum), scale, new_sum));
    add(values, size, weights, scale, next_keys);
  }

  // Scores in units of log 2; returns each query's highest so far.
  __m512 score(const bf16* keys, const bf16* values, int size, const std::uint16_t* visible,
               __m512 most, float* scores) {
    const __m512 scale = _mm512_set1_ps(1.44269504f / __builtin_sqrtf(D));
    for (int first = 0; first < size; first += KEYS) {
      alignas(64) bf16 last[KEYS * D];
      const bf16* group = keys + first * D;
      const int num = size - first < KEYS ? size - first : KEYS;
      if (num < KEYS) {  // what lies behind the last key may not be ours
        std::memset(last, 0, sizeof last);
        group = static_cast<bf16*>(std::memcpy(last, group, num * D * sizeof(bf16)));
      }
      const pair* key = reinterpret_cast<const pair*>(group);
      __m512 sums[KEYS] = {};
#pragma GCC unroll 4
      for (int p = 0; p < PAIRS; p++) {
        const auto query = (__m512bh)_mm512_load_si512(queries[p]);
        ask_for(values + first * D + p * (KEYS * D / PAIRS));
#pragma GCC unroll 16
        for (int k = 0; k < KEYS; k++)
          sums[k] = _mm512_dpbf16_ps(sums[k], query, broadcast(key + k * PAIRS + p));
      }
      for (int k = 0; k < num; k++) {
        __m512 x = _mm512_mul_ps(sums[k], scale);
        if (visible) x = _mm512_mask_mov_ps(_mm512_set1_ps(HIDDEN), visible[first + k], x);
        most = _mm512_max_ps(most, x);
        _mm512_store_ps(scores + (first + k) * LANES, x);
      }
    }
    return most;
  }

  // 2^(score - most) as pairs of keys; returns the sums over keys.
  static __m512 weigh(const float* scores, int size, __m512 most, pair* weights) {
    const __m512i interleave = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 sum = _mm512_setzero_ps();
    for (int k = 0; k < size; k += 2) {
      const __m512 a = exp2_of(_mm512_sub_ps(_mm512_load_ps(scores + k * LANES), most));
      __m512 b = _mm512_setzero_ps();
      if (k + 1 < size) b = exp2_of(_mm512_sub_ps(_mm512_load_ps(scores + (k + 1) * LANES), most));
      sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
      const auto both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      _mm512_store_si512(weights + k / 2 * LANES, _mm512_permutexvar_epi16(interleave, both));
    }
    return sum;
  }

  // averages = scale averages + weights values
  void add(const bf16* values, int size, const pair* weights, __m512 scale,
           const bf16* next_keys) {
    alignas(64) float scales[LANES];
    _mm512_store_ps(scales, scale);
    for (int d = 0; d < D / WIDTH; d++) {
      for (int first = 0; first < num_queries; first += QUERIES) {
        auto* kept = averages[d] + first;
        __m512 evens[QUERIES], odds[QUERIES];
        for (int q = 0; q < QUERIES; q++) {
          const __m512 x = _mm512_set1_ps(scales[first + q]);
          evens[q] = _mm512_mul_ps(_mm512_load_ps(kept[q][0]), x);
          odds[q] = _mm512_mul_ps(_mm512_load_ps(kept[q][1]), x);
        }
        for (int k = 0; k < size; k += 2) {
          const bf16* value = values + k * D + d * WIDTH;
          if (first == 0) {
            ask_for(next_keys + k * D + d * WIDTH);
            ask_for(next_keys + (k + 1) * D + d * WIDTH);
          }
          const __m512i a = _mm512_loadu_si512(value);
          const __m512i b = k + 1 < size ? _mm512_loadu_si512(value + D) : _mm512_setzero_si512();
          const auto even = (__m512bh)_mm512_unpacklo_epi16(a, b);
          const auto odd = (__m512bh)_mm512_unpackhi_epi16(a, b);
          const pair* weight = weights + k / 2 * LANES + first;
#pragma GCC unroll 8
          for (int q = 0; q < QUERIES; q++) {
            evens[q] = _mm512_dpbf16_ps(evens[q], even, broadcast(weight + q));
            odds[q] = _mm512_dpbf16_ps(odds[q], odd, broadcast(weight + q));
          }
        }
        for (int q = 0; q < QUERIES; q++) {
          _mm512_store_ps(kept[q][0], evens[q]);
          _mm512_store_ps(kept[q][1], odds[q]);
        }
      }
    }
  }

  // The averages, to rows that are `stride` numbers apart.
  void finish(bf16* out, int64_t stride) const {
    const __m512i lower = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const __m512i upper = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    for (int q = 0; q < num_queries; q++) {
      const __m512 scale = _mm512_set1_ps(1.f / sum[q]);
      for (int d = 0; d < D / WIDTH; d++) {
        const auto even = (__m512d)_mm512_mul_ps(_mm512_load_ps(averages[d][q][0]), scale);
        const auto odd = (__m512d)_mm512_mul_ps(_mm512_load_ps(averages[d][q][1]), scale);
        bf16* row = out + q * stride + d * WIDTH;
        store_rounded(row, (__m512)_mm512_permutex2var_pd(even, lower, odd));
        store_rounded(row + LANES, (__m512)_mm512_permutex2var_pd(even, upper, odd));
      }
    }
  }
};

// For each of `size` keys the queries that see it, as bits. The first key is number `first` of the
// new ones, which may be below 0; `own` has the rows of these queries. All see what is not new.
void see(std::uint16_t* visible, int size, const std::uint8_t* own, int num_queries,
         int64_t num_new, int64_t first) {
  for (int k = 0; k < size; k++) {
    const int64_t key = first + k;
    visible[k] = 0xffff;
    for (int q = 0; 0 <= key && key < num_new && q < num_queries; q++)
      if (!own[q * num_new + key]) visible[k] &= ~(1 << q);
  }
}

}  // namespace

// qkv (B, T, 3, H, d); keys, values: the first head of the buffers, in which heads are
// `head_stride` numbers apart; out (B, T, H, d); cos, sin (B or 1, T, d / 2), `angle_stride` from
// row to row; own (T, T) or null: which of the new keys a query sees. Writes the T = `num_new`
// tokens at `first_new`, and attends to the first `seen`.
extern "C" void cached_attention(const bf16* qkv, bf16* keys, bf16* values, bf16* out,
                                 const float* cos, const float* sin, const std::uint8_t* own,
                                 int64_t num_rows, int64_t num_heads, int64_t num_new,
                                 int64_t first_new, int64_t seen, int64_t head_stride,
                                 int64_t angle_stride, int64_t num_threads) {
  const int64_t part = num_heads * D, token = 3 * part;
  const int64_t num_tiles = (num_new + LANES - 1) / LANES;
#pragma omp parallel num_threads(num_threads)
  {
    const std::unique_ptr<Tile[]> tiles(new Tile[num_tiles]);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < num_rows * num_heads; task++) {
      const int64_t row = task / num_heads, head = task % num_heads;
      const bf16* x = qkv + row * num_new * token + head * D;
      bf16 *own_keys = keys + task * head_stride, *own_values = values + task * head_stride;
      for (int64_t t = 0; t < num_new; t++, x += token) {
        const int64_t angle = row * angle_stride + t * (D / 2);
        rotate(own_keys + (first_new + t) * D, x + part, cos + angle, sin + angle);
        std::memcpy(own_values + (first_new + t) * D, x + 2 * part, D * sizeof(bf16));
        const int64_t lane = t % LANES, left = num_new - t;
        if (lane == 0) tiles[t / LANES].start(left < LANES ? left : LANES);
        pair query[PAIRS];
        rotate(reinterpret_cast<bf16*>(query), x, cos + angle, sin + angle);
        tiles[t / LANES].set_query(lane, query);
      }
      for (int64_t first = 0; first < seen; first += BLOCK) {
        const int size = seen - first < BLOCK ? seen - first : BLOCK;
        const bf16* next = own_keys + (first + size < seen ? (first + BLOCK) * D : head_stride);
        const bool has_new = first_new < first + size && first < first_new + num_new;
        for (int64_t i = 0; i < num_tiles; i++) {
          std::uint16_t visible[BLOCK];
          if (own && has_new)
            see(visible, size, own + i * LANES * num_new, tiles[i].num_queries, num_new,
                first - first_new);
          tiles[i].meet(own_keys + first * D, own_values + first * D, size,
                        own && has_new ? visible : nullptr, next);
        }
      }
      for (int64_t i = 0; i < num_tiles; i++)
        tiles[i].finish(out + (row * num_new + i * LANES) * part + head * D, part);
    }
  }
}
