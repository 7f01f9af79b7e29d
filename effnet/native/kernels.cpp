// Operators of a training step that are slow in stock libraries on a CPU: depthwise convolution, batch norm + activation.
//
// Maps are channels-last: N x H x W x C, C contiguous. T is float or Bfloat16; arithmetic is float32 in 16 lanes
// (written with the compiler's vector extension: AVX-512 where there is any, narrower instructions elsewhere).
//
// Results do not depend on the number of threads: every sum is made of parts whose borders the shape alone decides, and
// the parts are added in order.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int L = 16;      // lanes
constexpr int V = 2;       // vectors in a block of channels: 32 bfloat16 fill a cache line
constexpr int B = L * V;   // channels in a block
constexpr int PARTS = 64;  // parts of a map, at least, for threads and sums
constexpr size_t LARGE = 24 << 20;  // bytes of a map from which on it is written past the caches
constexpr int TILE = 8;    // rows of a map that are summed before moving to the next channels

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4), may_alias));

struct Bfloat16 { uint16_t bits; };

inline vec all(float value) { return vec{} + value; }

inline vec load(const float* p) { return *(const vec*)p; }
inline void store(float* p, vec v) { *(vec*)p = v; }

inline vec load(const Bfloat16* p) { return (vec)(__builtin_convertvector(*(const hvec*)p, uvec) << 16); }

inline void store(Bfloat16* p, vec v) {  // to nearest, ties to even
#if defined(__AVX512BF16__)
  __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof half);
#else
  uvec bits = (uvec)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *(hvec*)p = __builtin_convertvector(bits, hvec);
#endif
}

// Past the caches: for maps that they could not keep anyway, a plain store would first read what it overwrites. Aligned.
inline void stream(float* p, vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#else
  store(p, v);
#endif
}
inline void stream(Bfloat16* p, vec v) {
#if defined(__AVX512BF16__)
  _mm256_stream_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  store(p, v);
#endif
}

// The first `count` lanes, then zeros.
template <class T> inline vec load(const T* p, int count) {
  if (count >= L) return load(p);
  T lanes[L];
  std::memset(lanes, 0, sizeof lanes);
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

template <class T> inline void store(T* p, vec v, int count) {
  if (count >= L) return store(p, v);
  T lanes[L];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline __mmask16 lanes(int count) { return (__mmask16)((1u << count) - 1); }

template <> inline vec load(const float* p, int count) {
  return count >= L ? load(p) : (vec)_mm512_maskz_loadu_ps(lanes(count), p);
}
template <> inline vec load(const Bfloat16* p, int count) {
  if (count >= L) return load(p);
  return (vec)(__builtin_convertvector((hvec)_mm256_maskz_loadu_epi16(lanes(count), p), uvec) << 16);
}
template <> inline void store(float* p, vec v, int count) {
  count >= L ? store(p, v) : _mm512_mask_storeu_ps(p, lanes(count), (__m512)v);
}
#if defined(__AVX512BF16__)
template <> inline void store(Bfloat16* p, vec v, int count) {
  count >= L ? store(p, v) : _mm256_mask_storeu_epi16(p, lanes(count), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#endif
#endif

inline int least(int a, int b) { return a < b ? a : b; }

struct Floats {  // scratch memory of one thread
  float* data;
  explicit Floats(size_t count) : data((float*)std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)) {}
  ~Floats() { std::free(data); }
};

// --- depthwise convolution -------------------------------------------------------------------------------------------

struct Window {  // of a convolution: input H x W, output OH x OW, padded by `top` and `left` before its first row, column
  int N, H, W, C, OH, OW, top, left;
};

// A ring of K widened rows of one block of channels: planes of L channels, each row with `margin` zero columns around.
// Every row of the map is read and widened once, and no inner loop has to look where the map ends.
template <class T, int K> struct Ring {
  int width, stride, plane, margin;
  const T* map;
  int rows, channels, count;  // of the map; `count` of its channels are in this block
  Floats memory;
  int next = -K;

  Ring(int width, int margin)
      : width(width), plane((width + 2 * margin) * L), margin(margin), memory((size_t)K * V * plane) {
    stride = V * plane;
  }

  void start(const T* first, int height, int all_channels, int in_block) {
    map = first, rows = height, channels = all_channels, count = in_block;
    next = -K;
  }

  // Rows [.., last] are in the ring; rows outside the map are zeros. Call with rising `last`.
  void reach(int last) {
    if (next < last - K + 1) next = last - K + 1;
    for (; next <= last; ++next) {
      float* out = memory.data + (size_t)slot(next) * stride;
      if (next < 0 || next >= rows) {
        std::memset(out, 0, stride * sizeof(float));
        continue;
      }
      const T* row = map + (size_t)next * width * channels;
      for (int v = 0; v < V; ++v) {
        float* to = out + v * plane;
        std::memset(to, 0, margin * L * sizeof(float));
        std::memset(to + (margin + width) * L, 0, margin * L * sizeof(float));
      }
      float* to = out + margin * L;
      if (count == B) {
        for (int x = 0; x < width; ++x)
          for (int v = 0; v < V; ++v) store(to + v * plane + x * L, load(row + (size_t)x * channels + v * L));
      } else {
        for (int x = 0; x < width; ++x)
          for (int v = 0; v < V; ++v)
            store(to + v * plane + x * L,
                  count > v * L ? load(row + (size_t)x * channels + v * L, count - v * L) : vec{});
      }
    }
  }

  // Column 0 of plane v of a row.
  const float* at(int row, int v) const { return memory.data + (size_t)slot(row) * stride + v * plane + margin * L; }

  static int slot(int row) { return (row + 64 * K) % K; }
};

// weights: (K*K, C) float32.
template <int K> inline void load_weights(vec (&w)[K * K], const float* weights, int C, int count) {
  for (int i = 0; i < K * K; ++i) w[i] = load(weights + (size_t)i * C, count);
}

template <class T, int K, int S>
void depthwise_forward(const T* x, const float* weights, T* y, Window s, int threads) {
  const int blocks = (s.C + B - 1) / B;
#pragma omp parallel num_threads(threads)
  {
    Ring<T, K> ring(s.W, K);
#pragma omp for schedule(static) collapse(2)
    for (int n = 0; n < s.N; ++n)
      for (int b = 0; b < blocks; ++b) {
        const int c = b * B, count = least(B, s.C - c);
        ring.start(x + (size_t)n * s.H * s.W * s.C + c, s.H, s.C, count);
        for (int oy = 0; oy < s.OH; ++oy) {
          const int first = oy * S - s.top;
          ring.reach(first + K - 1);
          T* out = y + ((size_t)n * s.OH + oy) * s.OW * s.C + c;
          for (int v = 0; v * L < count; ++v) {
            vec w[K * K];
            load_weights<K>(w, weights + c + v * L, s.C, count - v * L);
            const float* rows[K];
            for (int ky = 0; ky < K; ++ky) rows[ky] = ring.at(first + ky, v) - s.left * L;
            for (int ox = 0; ox < s.OW; ++ox) {
              vec sum{};
#pragma GCC unroll 7
              for (int ky = 0; ky < K; ++ky)
#pragma GCC unroll 7
                for (int kx = 0; kx < K; ++kx) sum += load(rows[ky] + (ox * S + kx) * L) * w[ky * K + kx];
              store(out + (size_t)ox * s.C + v * L, sum, count - v * L);
            }
          }
        }
      }
  }
}

// The input columns x with (x + left) % S == PX of one row: a sum over the outputs that read them.
template <class T, int K, int S, int PY, int PX>
void input_row(const Ring<T, K>& ring, const vec (&w)[K * K], int v, int last, T* out, const Window& s, int count) {
  const int x0 = ((PX - s.left) % S + S) % S, end = s.W, channels = s.C;
  const float* rows[K];
  for (int ky = PY; ky < K; ky += S) rows[ky] = ring.at(last - (ky - PY) / S, v) + (x0 + s.left - PX) / S * L;
  for (int x = x0, step = 0; x < end; x += S, step += L) {
    vec sum{};
#pragma GCC unroll 7
    for (int ky = PY; ky < K; ky += S)
#pragma GCC unroll 7
      for (int kx = PX; kx < K; kx += S) sum += load(rows[ky] + step - (kx - PX) / S * L) * w[ky * K + kx];
    store(out + (size_t)x * channels, sum, count);
  }
}

template <class T, int K, int S>
void input_gradient(Ring<T, K>& ring, const T* dy, const float* weights, T* dx, Window s, int c) {
  const int count = least(B, s.C - c);
  ring.start(dy, s.OH, s.C, count);
  for (int y = 0; y < s.H; ++y) {
    const int parity = (y + s.top) % S, last = (y + s.top - parity) / S;  // the last output row that reads this one
    ring.reach(last);
    for (int v = 0; v * L < count; ++v) {
      vec w[K * K];
      load_weights<K>(w, weights + c + v * L, s.C, count - v * L);
      T* out = dx + (size_t)y * s.W * s.C + v * L;
      const int lanes = count - v * L;
      if constexpr (S == 1) {
        input_row<T, K, 1, 0, 0>(ring, w, v, last, out, s, lanes);
      } else if (parity == 0) {
        input_row<T, K, 2, 0, 0>(ring, w, v, last, out, s, lanes);
        input_row<T, K, 2, 0, 1>(ring, w, v, last, out, s, lanes);
      } else {
        input_row<T, K, 2, 1, 0>(ring, w, v, last, out, s, lanes);
        input_row<T, K, 2, 1, 1>(ring, w, v, last, out, s, lanes);
      }
    }
  }
}

// Adds one image's part to `sums`: (K*K, B) float32. `ring` holds rows of x, `row` one row of dy.
template <class T, int K, int S>
void weight_gradient(Ring<T, K>& ring, Ring<T, 1>& row, const T* x, const T* dy, float* sums, Window s, int count) {
  ring.start(x, s.H, s.C, count);
  row.start(dy, s.OH, s.C, count);
  for (int oy = 0; oy < s.OH; ++oy) {
    const int first = oy * S - s.top;
    ring.reach(first + K - 1);
    row.reach(oy);
    for (int v = 0; v * L < count; ++v) {
      const float* gradient = row.at(oy, v);
      constexpr int R = K <= 5 ? K : 1;  // window rows at a time, so that the sums stay in registers
      for (int k0 = 0; k0 < K; k0 += R) {
        vec sum[R * K];
        for (int i = 0; i < R * K; ++i) sum[i] = load(sums + (size_t)(k0 * K + i) * B + v * L);
        const float* rows[R];
        for (int ky = 0; ky < R; ++ky) rows[ky] = ring.at(first + k0 + ky, v) - s.left * L;
        for (int ox = 0; ox < s.OW; ++ox) {
          const vec g = load(gradient + ox * L);
#pragma GCC unroll 7
          for (int ky = 0; ky < R; ++ky)
#pragma GCC unroll 7
            for (int kx = 0; kx < K; ++kx) sum[ky * K + kx] += g * load(rows[ky] + (ox * S + kx) * L);
        }
        for (int i = 0; i < R * K; ++i) store(sums + (size_t)(k0 * K + i) * B + v * L, sum[i]);
      }
    }
  }
}

// dx, dweights: null where not wanted. dweights: (K*K, C) float32.
template <class T, int K, int S>
void depthwise_backward(const T* dy, const T* x, const float* weights, T* dx, float* dweights, Window s, int threads) {
  const int blocks = (s.C + B - 1) / B;
  std::vector<float> parts(dweights ? (size_t)s.N * blocks * K * K * B : 0, 0.f);
#pragma omp parallel num_threads(threads)
  {
    Ring<T, K> ring(s.W, K), gradients(s.OW, K);
    Ring<T, 1> row(s.OW, 0);
#pragma omp for schedule(static) collapse(2)
    for (int n = 0; n < s.N; ++n)
      for (int b = 0; b < blocks; ++b) {
        const int c = b * B, count = least(B, s.C - c);
        const size_t in = (size_t)n * s.H * s.W * s.C + c, out = (size_t)n * s.OH * s.OW * s.C + c;
        if (dweights)
          weight_gradient<T, K, S>(ring, row, x + in, dy + out, &parts[((size_t)n * blocks + b) * K * K * B], s, count);
        if (dx) input_gradient<T, K, S>(gradients, dy + out, weights, dx + in, s, c);
      }
#pragma omp for schedule(static)
    for (int b = 0; b < (dweights ? blocks : 0); ++b)
      for (int i = 0; i < K * K; ++i)
        for (int v = 0; v < V; ++v) {
          const int c = b * B + v * L;
          if (c >= s.C) continue;
          vec sum{};
          for (int n = 0; n < s.N; ++n) sum += load(&parts[(((size_t)n * blocks + b) * K * K + i) * B + v * L]);
          store(dweights + (size_t)i * s.C + c, sum, s.C - c);
        }
  }
}

// --- batch norm with activation --------------------------------------------------------------------------------------

enum Act { NONE, RELU, RELU6, SILU };

#if defined(__AVX512DQ__)
// 2^t: a polynomial on [0, 1), minimax in the relative error (7.5e-8), times 2^floor(t).
inline vec exp2(vec t) {
  const vec f = (vec)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vec p = all(1.877576671e-3f);
  p = p * f + 8.989340340e-3f;
  p = p * f + 5.582631759e-2f;
  p = p * f + 2.401536173e-1f;
  p = p * f + 6.931530731e-1f;
  p = p * f + 9.999999251e-1f;
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)t);
}

// 1 / (1 + e^-z), the reciprocal by one Newton step from 14 bits. Relative error below 3e-7 for |z| < 20.
inline vec sigmoid(vec z) {
  const vec d = (vec)_mm512_min_ps((__m512)exp2(z * -1.442695041f), _mm512_set1_ps(1e37f)) + 1.f;
  const vec r = (vec)_mm512_rcp14_ps((__m512)d);
  return r * (2.f - d * r);
}

// The same to 14 bits, for gradients that are rounded to 8.
inline vec roughly_sigmoid(vec z) { return (vec)_mm512_rcp14_ps((__m512)(exp2(z * -1.442695041f) + 1.f)); }
#else
inline vec sigmoid(vec z) {  // e^-z = 2^n e^r with |r| <= ln 2 / 2 (Cephes' expf)
  vec x = -z;
  const vec low = all(-87.f), high = all(87.f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  const vec n = (x * 1.442695041f + shift) - shift;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  return 1.f / (1.f + p * (vec)power);
}
inline vec roughly_sigmoid(vec z) { return sigmoid(z); }
#endif

template <int A> inline vec activated(vec z) {
  if (A == SILU) return z * sigmoid(z);
  if (A >= RELU) z = z > 0.f ? z : vec{};
  if (A == RELU6) z = z < 6.f ? z : all(6.f);
  return z;
}

template <class T, int A> inline vec slope(vec z) {  // of the activation; ReLU's kinks count as flat, as in PyTorch
  if (A == SILU) {
    const vec s = std::is_same_v<T, Bfloat16> ? roughly_sigmoid(z) : sigmoid(z);
    return s * (1.f + z * (1.f - s));
  }
  vec one = all(1.f);
  if (A >= RELU) one = z > 0.f ? one : vec{};
  if (A == RELU6) one = z < 6.f ? one : vec{};
  return one;
}

struct Map {  // N images of HW pixels of C channels, cut into parts for threads and sums; no part crosses an image
  int N, HW, C;
  int cuts() const { return N >= PARTS ? 1 : least((PARTS + N - 1) / N, HW); }  // parts of an image
  int parts() const { return N * cuts(); }
};

struct Part {  // pixels [first, last) of the whole map, all of image n
  int n;
  long first, last;
  Part(int part, const Map& s) : n(part / s.cuts()) {
    const long cut = part % s.cuts(), cuts = s.cuts();
    first = (long)n * s.HW + s.HW * cut / cuts;
    last = (long)n * s.HW + s.HW * (cut + 1) / cuts;
  }
};

// Calls `body(m, rows, c, lanes)` for all pixels and channels of a part: `rows` pixels from m on, `lanes` channels from c.
// Pixels come in tiles, channels within, so that a tile is still in the cache for its next channels.
template <class F> inline void tiles(const Part& part, int C, F body) {
  for (long m = part.first; m < part.last; m += TILE) {
    const int rows = (int)(part.last - m < TILE ? part.last - m : TILE);
    for (int c = 0; c < C; c += L) body(m, rows, c, least(L, C - c));
  }
}

inline void add(float* sums, vec more, int lanes) { store(sums, load(sums, lanes) + more, lanes); }

// The sums over rows [first, last) of `parts` (rows, C), one for each channel: in order and in double precision. Row by
// row, as memory lies: column by column these few numbers took as long as a small map.
std::vector<double> added(const std::vector<float>& parts, int first, int last, int C) {
  std::vector<double> sums(C, 0.);
  for (int p = first; p < last; ++p)
    for (int c = 0; c < C; ++c) sums[c] += parts[(size_t)p * C + c];
  return sums;
}

// mean, variance (biased) of each channel of x. Sums run over x - origin, origin being the first pixel, so that a mean
// far from zero costs no digits.
template <class T> void moments(const T* x, float* mean, float* variance, Map s, int threads) {
  const int C = s.C, parts = s.parts();
  const double M = (double)s.N * s.HW;
  std::vector<float> sums((size_t)parts * C, 0.f), squares((size_t)parts * C, 0.f);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int p = 0; p < parts; ++p) {
    float *sum = &sums[(size_t)p * C], *square = &squares[(size_t)p * C];
    tiles(Part(p, s), C, [=](long m, int rows, int c, int lanes) {
      const vec origin = load(x + c, lanes);
      vec a{}, b{};
      for (int r = 0; r < rows; ++r) {
        const vec d = load(x + (m + r) * C + c, lanes) - origin;
        a += d;
        b += d * d;
      }
      add(sum + c, a, lanes);
      add(square + c, b, lanes);
    });
  }
  const auto total = added(sums, 0, parts, C), total_square = added(squares, 0, parts, C);
  for (int c = 0; c < C; ++c) {
    float origin[L];
    store(origin, load(x + c, 1));
    const double shifted = total[c] / M, spread = total_square[c] / M - shifted * shifted;
    mean[c] = (float)(origin[0] + shifted);
    variance[c] = (float)(spread > 0 ? spread : 0);
  }
}

// Calls `body(m, c, lanes)` for all pixels m and channels c of a part in the order of memory.
template <class F> inline void rows(const Part& part, int C, F body) {
  for (long m = part.first; m < part.last; ++m)
    for (int c = 0; c < C; c += L) body(m, c, least(L, C - c));
}

template <class T> inline bool streams(const T* map, const Map& s) {
  return s.C % L == 0 && (size_t)s.N * s.HW * s.C * sizeof(T) >= LARGE && (uintptr_t)map % 64 == 0;
}

// y = act(x * scale + shift), per channel; `pooled` (N, C), where wanted: the mean of y over each image.
template <class T, int A>
void norm_forward(const T* x, const float* scale, const float* shift, T* y, float* pooled, Map s, int threads) {
  const int C = s.C, parts = s.parts();
  const bool streaming = streams(y, s);
  std::vector<float> sums(pooled ? (size_t)parts * C : 0, 0.f);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int p = 0; p < parts; ++p) {
    float* sum = pooled ? &sums[(size_t)p * C] : nullptr;
    const auto value = [=](long m, int c, int lanes) {
      const vec v = activated<A>(load(x + m * C + c, lanes) * load(scale + c, lanes) + load(shift + c, lanes));
      if (sum) add(sum + c, v, lanes);
      return v;
    };
    const Part part(p, s);
    if (streaming)
      rows(part, C, [=](long m, int c, int) { stream(y + m * C + c, value(m, c, L)); });
    else
      rows(part, C, [=](long m, int c, int lanes) { store(y + m * C + c, value(m, c, lanes), lanes); });
  }
  for (int n = 0; pooled && n < s.N; ++n) {
    const auto total = added(sums, n * s.cuts(), (n + 1) * s.cuts(), C);
    for (int c = 0; c < C; ++c) pooled[(size_t)n * C + c] = (float)(total[c] / s.HW);
  }
}

// With xhat = (x - mean) * rstd, z = xhat * weight + bias = x * scale + shift and dz = (dy + dpooled / HW) * act'(z):
// dbias = sum dz, dweight = sum dz xhat, dx = weight * rstd * (dz - dbias / M - xhat * dweight / M).
// dz is computed twice: that is hidden behind the memory, writing and reading it would not be. `dpooled`, `dx`: may be
// null.
template <class T, int A>
void norm_backward(const T* dy, const float* dpooled, const T* x, const float* mean, const float* rstd,
                   const float* weight, const float* bias, T* dx, float* dweight, float* dbias, Map s, int threads) {
  const int C = s.C, parts = s.parts();
  const float share = 1.f / s.HW;
  std::vector<float> sums((size_t)parts * C, 0.f), products((size_t)parts * C, 0.f);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int p = 0; p < parts; ++p) {
    float *sum = &sums[(size_t)p * C], *product = &products[(size_t)p * C];
    const Part part(p, s);
    tiles(part, C, [=](long m, int rows, int c, int lanes) {
      const vec center = load(mean + c, lanes), inverse = load(rstd + c, lanes);
      const vec scale = load(weight + c, lanes) * inverse, b = load(bias + c, lanes);
      const vec extra = dpooled ? load(dpooled + (size_t)part.n * C + c, lanes) * share : vec{};
      vec a{}, q{};
      for (int r = 0; r < rows; ++r) {
        const vec d = load(x + (m + r) * C + c, lanes) - center;
        const vec dz = (load(dy + (m + r) * C + c, lanes) + extra) * slope<T, A>(d * scale + b);
        a += dz;
        q += dz * d;
      }
      add(sum + c, a, lanes);
      add(product + c, q * inverse, lanes);
    });
  }
  // dx = scale * dz + times * x + plus
  std::vector<float> scales(C), shifts(C), times(C), plus(C);
  const double one = 1. / ((double)s.N * s.HW);
  const auto totals = added(sums, 0, parts, C), total_products = added(products, 0, parts, C);
  for (int c = 0; c < C; ++c) {
    const double total = totals[c], product = total_products[c];
    dbias[c] = (float)total;
    dweight[c] = (float)product;
    const double scale = (double)weight[c] * rstd[c], center = mean[c];
    scales[c] = (float)scale;
    shifts[c] = (float)(bias[c] - center * scale);
    times[c] = (float)(-scale * rstd[c] * product * one);
    plus[c] = (float)(-scale * one * (total - center * rstd[c] * product));
  }
  if (!dx) return;
  const bool streaming = streams(dx, s);
  const float *scale = scales.data(), *shift = shifts.data(), *by = times.data(), *more = plus.data();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int p = 0; p < parts; ++p) {
    const Part part(p, s);
    const float* extra = dpooled ? dpooled + (size_t)part.n * C : nullptr;
    const auto value = [=](long m, int c, int lanes) {
      const vec in = load(x + m * C + c, lanes), a = load(scale + c, lanes);
      vec d = load(dy + m * C + c, lanes);
      if (extra) d += load(extra + c, lanes) * share;
      return a * d * slope<T, A>(in * a + load(shift + c, lanes)) + in * load(by + c, lanes) + load(more + c, lanes);
    };
    if (streaming)
      rows(part, C, [=](long m, int c, int) { stream(dx + m * C + c, value(m, c, L)); });
    else
      rows(part, C, [=](long m, int c, int lanes) { store(dx + m * C + c, value(m, c, lanes), lanes); });
  }
}

// --- the gate of squeeze-excite ---------------------------------------------------------------------------------------

// y = x * gate; gate: (N, C) float32.
template <class T> void gate_forward(const T* x, const float* gate, T* y, Map s, int threads) {
  const int C = s.C;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int p = 0; p < s.parts(); ++p) {
    const Part part(p, s);
    tiles(part, C, [=](long m, int rows, int c, int lanes) {
      const vec g = load(gate + (size_t)part.n * C + c, lanes);
      for (int r = 0; r < rows; ++r) store(y + (m + r) * C + c, load(x + (m + r) * C + c, lanes) * g, lanes);
    });
  }
}

// dx = dy * gate, dgate = sum over the image of dy * x.
template <class T>
void gate_backward(const T* dy, const T* x, const float* gate, T* dx, float* dgate, Map s, int threads) {
  const int C = s.C, parts = s.parts();
  std::vector<float> sums((size_t)parts * C, 0.f);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int p = 0; p < parts; ++p) {
    float* sum = &sums[(size_t)p * C];
    const Part part(p, s);
    tiles(part, C, [=](long m, int rows, int c, int lanes) {
      const vec g = load(gate + (size_t)part.n * C + c, lanes);
      vec a{};
      for (int r = 0; r < rows; ++r) {
        const vec d = load(dy + (m + r) * C + c, lanes);
        a += d * load(x + (m + r) * C + c, lanes);
        store(dx + (m + r) * C + c, d * g, lanes);
      }
      add(sum + c, a, lanes);
    });
  }
  for (int n = 0; n < s.N; ++n) {
    const auto total = added(sums, n * s.cuts(), (n + 1) * s.cuts(), C);
    for (int c = 0; c < C; ++c) dgate[(size_t)n * C + c] = (float)total[c];
  }
}

}  // namespace

// --- the step of RMSProp ----------------------------------------------------------------------------------------------

// One pass over each tensor's memory: g += decay_weights w; s <- a s + (1 - a) g^2; m <- b m + lr g / sqrt(s + eps); w -= m.
struct RmspropTensor {
  float* w;
  const float* g;
  float *s, *m;
  int64_t count;
};
struct RmspropRates { float lr, decay, momentum, eps, weight_decay; };

void rmsprop(const RmspropTensor* tensors, int count, const RmspropRates& r, int threads) {
  constexpr int64_t CHUNK = 1 << 15;
  std::vector<RmspropTensor> chunks;
  for (const RmspropTensor* t = tensors; t < tensors + count; ++t)
    for (int64_t i = 0; i < t->count; i += CHUNK)
      chunks.push_back({t->w + i, t->g + i, t->s + i, t->m + i, std::min(CHUNK, t->count - i)});
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t c = 0; c < chunks.size(); ++c) {
    const RmspropTensor t = chunks[c];
    for (int64_t i = 0; i < t.count; ++i) {
      const float w = t.w[i], g = t.g[i] + r.weight_decay * w;
      const float s = r.decay * t.s[i] + (1 - r.decay) * g * g;
      const float m = r.momentum * t.m[i] + r.lr * g / std::sqrt(s + r.eps);
      t.s[i] = s;
      t.m[i] = m;
      t.w[i] = w - m;
    }
  }
}

// --- what Python calls: `half` says bfloat16; 0 is done, 1 a kernel, stride or activation that is not here ------------

#define WINDOW_CASES(CALL)                                                                     \
  switch (kernel * 10 + stride) {                                                              \
    case 31: CALL(3, 1); return 0;                                                             \
    case 32: CALL(3, 2); return 0;                                                             \
    case 51: CALL(5, 1); return 0;                                                             \
    case 52: CALL(5, 2); return 0;                                                             \
    case 71: CALL(7, 1); return 0;                                                             \
    case 72: CALL(7, 2); return 0;                                                             \
  }                                                                                            \
  return 1;

#define ACT_CASES(CALL)                                                                        \
  switch (act) {                                                                               \
    case NONE: CALL(NONE); return 0;                                                           \
    case RELU: CALL(RELU); return 0;                                                           \
    case RELU6: CALL(RELU6); return 0;                                                         \
    case SILU: CALL(SILU); return 0;                                                           \
  }                                                                                            \
  return 1;

extern "C" {

int effnet_depthwise_forward(int half, const void* x, const float* weights, void* y, const int* window, int kernel,
                             int stride, int threads) {
  Window s;
  std::memcpy(&s, window, sizeof s);
#define CALL(K, S)                                                                                             \
  half ? depthwise_forward<Bfloat16, K, S>((const Bfloat16*)x, weights, (Bfloat16*)y, s, threads)               \
       : depthwise_forward<float, K, S>((const float*)x, weights, (float*)y, s, threads)
  WINDOW_CASES(CALL)
#undef CALL
}

int effnet_depthwise_backward(int half, const void* dy, const void* x, const float* weights, void* dx, float* dweights,
                              const int* window, int kernel, int stride, int threads) {
  Window s;
  std::memcpy(&s, window, sizeof s);
#define CALL(K, S)                                                                                             \
  half ? depthwise_backward<Bfloat16, K, S>((const Bfloat16*)dy, (const Bfloat16*)x, weights, (Bfloat16*)dx,    \
                                            dweights, s, threads)                                               \
       : depthwise_backward<float, K, S>((const float*)dy, (const float*)x, weights, (float*)dx, dweights, s, threads)
  WINDOW_CASES(CALL)
#undef CALL
}

int effnet_moments(int half, const void* x, float* mean, float* variance, int n, int pixels, int channels, int threads) {
  const Map s{n, pixels, channels};
  half ? moments((const Bfloat16*)x, mean, variance, s, threads) : moments((const float*)x, mean, variance, s, threads);
  return 0;
}

int effnet_norm_forward(int half, int act, const void* x, const float* scale, const float* shift, void* y, float* pooled,
                        int n, int pixels, int channels, int threads) {
  const Map s{n, pixels, channels};
#define CALL(A)                                                                                                \
  half ? norm_forward<Bfloat16, A>((const Bfloat16*)x, scale, shift, (Bfloat16*)y, pooled, s, threads)          \
       : norm_forward<float, A>((const float*)x, scale, shift, (float*)y, pooled, s, threads)
  ACT_CASES(CALL)
#undef CALL
}

int effnet_norm_backward(int half, int act, const void* dy, const float* dpooled, const void* x, const float* mean,
                         const float* rstd, const float* weight, const float* bias, void* dx, float* dweight,
                         float* dbias, int n, int pixels, int channels, int threads) {
  const Map s{n, pixels, channels};
#define CALL(A)                                                                                                \
  half ? norm_backward<Bfloat16, A>((const Bfloat16*)dy, dpooled, (const Bfloat16*)x, mean, rstd, weight, bias, \
                                    (Bfloat16*)dx, dweight, dbias, s, threads)                                  \
       : norm_backward<float, A>((const float*)dy, dpooled, (const float*)x, mean, rstd, weight, bias,          \
                                 (float*)dx, dweight, dbias, s, threads)
  ACT_CASES(CALL)
#undef CALL
}

int effnet_gate_forward(int half, const void* x, const float* gate, void* y, int n, int pixels, int channels,
                        int threads) {
  const Map s{n, pixels, channels};
  half ? gate_forward((const Bfloat16*)x, gate, (Bfloat16*)y, s, threads)
       : gate_forward((const float*)x, gate, (float*)y, s, threads);
  return 0;
}

int effnet_gate_backward(int half, const void* dy, const void* x, const float* gate, void* dx, float* dgate, int n,
                         int pixels, int channels, int threads) {
  const Map s{n, pixels, channels};
  half ? gate_backward((const Bfloat16*)dy, (const Bfloat16*)x, gate, (Bfloat16*)dx, dgate, s, threads)
       : gate_backward((const float*)dy, (const float*)x, gate, (float*)dx, dgate, s, threads);
  return 0;
}

int effnet_rmsprop(const void* tensors, int count, const float* rates, int threads) {
  RmspropRates r;
  std::memcpy(&r, rates, sizeof r);
  rmsprop((const RmspropTensor*)tensors, count, r, threads);
  return 0;
}

}  // extern "C"
