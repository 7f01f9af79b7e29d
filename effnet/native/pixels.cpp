// Operators on uint8 pictures (rows of RGB) that a view needs: resampling, tables, nearest-pixel maps, blends.
//
// Every one gives the very bytes that Pillow gives on x86-64 (fixed-point weights, float blends, the same roundings):
// with and without a compiler a sample looks the same. Written with the compiler's vector extension, 16 lanes.
// Pictures are contiguous rows of `stride` bytes. Build without contraction of a * b + c: Pillow's blends round twice.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

typedef uint8_t u8;
typedef u8 bvec __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t hvec __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
typedef float fvec __attribute__((vector_size(64), aligned(4)));

constexpr int L = 16;  // lanes

inline bvec bytes(const u8* p) { return *(const bvec*)p; }
inline ivec widened(bvec v) {
#if defined(__AVX512F__)
  return (ivec)_mm512_cvtepu8_epi32((__m128i)v);
#else
  return __builtin_convertvector(__builtin_convertvector(v, hvec), ivec);  // g++ takes both steps at once one by one
#endif
}
inline bvec narrowed(ivec v) {  // clipped to 0..255
#if defined(__AVX512F__)
  return (bvec)_mm512_cvtusepi32_epi8(_mm512_max_epi32((__m512i)v, _mm512_setzero_si512()));
#else
  v = v < 0 ? ivec{} : v;
  return __builtin_convertvector(v > 255 ? ivec{} + 255 : v, bvec);
#endif
}

// --- resampling: two passes of fixed-point weighted sums, as Pillow's ------------------------------------------------

constexpr int BITS = 22;  // of the weights behind the point: 32 - 8 for the byte - 2 for what overshoots

double bilinear(double x) {
  x = std::fabs(x);
  return x < 1 ? 1 - x : 0;
}

double bicubic(double x) {  // Keys, a = -1/2
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

struct Weights {  // of each output: `count` inputs from `first` on, at `at` in `values`
  std::vector<int> first, count, at, values;

  // [low, high) of `length` inputs becomes `whole` outputs, and of these `size` from `start` on are wanted; the filter
  // widens when the picture shrinks.
  Weights(int length, float low, float high, int whole, int start, int size, bool cubic)
      : first(size), count(size), at(size) {
    const double scale = (double)(high - low) / whole, wide = scale < 1 ? 1 : scale;
    const double reach = (cubic ? 2.0 : 1.0) * wide, inverse = 1.0 / wide;
    std::vector<double> exact;
    for (int i = 0; i < size; ++i) {
      const double center = low + (start + i + 0.5) * scale;
      int from = (int)(center - reach + 0.5), to = (int)(center + reach + 0.5);
      if (from < 0) from = 0;
      if (to > length) to = length;
      exact.clear();
      double sum = 0;
      for (int x = from; x < to; ++x) {
        const double at_x = (x - center + 0.5) * inverse;
        exact.push_back(cubic ? bicubic(at_x) : bilinear(at_x));
        sum += exact.back();
      }
      first[i] = from, count[i] = to - from, at[i] = (int)values.size();
      for (double w : exact) {
        if (sum != 0) w /= sum;
        values.push_back((int)((w < 0 ? -0.5 : 0.5) + w * (1 << BITS)));
      }
    }
  }
};

// 16 rows of 16 bytes at p, `stride` apart, as 16 columns.
inline void transpose(bvec (&m)[L]) {
  bvec t[L];
  for (int round = 0; round < 4; ++round) {  // interleaving halves four times sends bit k of an index to bit k + 4
    for (int i = 0; i < L / 2; ++i) {
      t[2 * i] = __builtin_shufflevector(m[i], m[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      t[2 * i + 1] =
          __builtin_shufflevector(m[i], m[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < L; ++i) m[i] = t[i];
  }
}

// The `count` (at most 16) bytes at p, then zeros.
inline bvec some(const u8* p, int count) {
  if (count >= L) return bytes(p);
  bvec v{};
  std::memcpy(&v, p, count);
  return v;
}

// Rows [0, 16) of a band become columns: column c of the band is out[16 * c ...].
void to_columns(const u8* const (&rows)[L], int length, u8* out) {
  for (int c = 0; c < length; c += L) {
    bvec m[L];
    for (int r = 0; r < L; ++r) m[r] = some(rows[r] + c, length - c);
    transpose(m);
    std::memcpy(out + (size_t)c * L, m, sizeof m);
  }
}

struct Bytes {  // scratch memory that one thread keeps from picture to picture, so that it is not cleared anew each time
  std::vector<u8> memory;
  u8* room(size_t count) {
    if (memory.size() < count) memory.resize(count);
    return memory.data();
  }
};

// `box` (left, top, right, bottom) of the picture at whole[0] x whole[1]; of that `window` (left, top, width, height).
int resize(const u8* in, long stride, int width, int height, const float* box, const int* whole, const int* window,
           u8* out, int cubic, int flip) {
  const int columns = window[2], lines = window[3];
  const Weights across(width, box[0], box[2], whole[0], window[0], columns, cubic);
  const Weights down(height, box[1], box[3], whole[1], window[1], lines, cubic);
  const int top = down.first[0], bottom = down.first[lines - 1] + down.count[lines - 1];
  const int length = columns * 3, padded = (length + 63) / 64 * 64;
  static thread_local Bytes kept_rows, kept_band, kept_done;
  u8* const rows = kept_rows.room((size_t)(bottom - top + L) * padded);  // after the first pass
  u8* const band = kept_band.room((size_t)(width * 3 + L) * L);
  u8* const done = kept_done.room((size_t)(padded + L) * L);
  for (int y = top; y < bottom; y += L) {
    const u8* sources[L];
    for (int r = 0; r < L; ++r) sources[r] = in + (y + r < bottom ? y + r : bottom - 1) * stride;
    const int from = across.first[0], to = across.first[columns - 1] + across.count[columns - 1];
    for (int r = 0; r < L; ++r) sources[r] += from * 3;
    to_columns(sources, (to - from) * 3, band);
    for (int i = 0; i < columns; ++i) {
      const int* w = &across.values[across.at[i]];
      const u8* column = &band[(size_t)(across.first[i] - from) * 3 * L];
      ivec sum[3] = {ivec{} + (1 << (BITS - 1)), ivec{} + (1 << (BITS - 1)), ivec{} + (1 << (BITS - 1))};
      for (int k = 0; k < across.count[i]; ++k, column += 3 * L)
        for (int c = 0; c < 3; ++c) sum[c] += widened(bytes(column + c * L)) * w[k];
      u8* to_column = &done[(size_t)(flip ? columns - 1 - i : i) * 3 * L];
      for (int c = 0; c < 3; ++c) *(bvec*)(to_column + c * L) = narrowed(sum[c] >> BITS);
    }
    for (int c = 0; c < length; c += L) {
      bvec m[L];
      std::memcpy(m, &done[(size_t)c * L], sizeof m);
      transpose(m);
      for (int r = 0; r < L; ++r) *(bvec*)&rows[(size_t)(y - top + r) * padded + c] = m[r];
    }
  }
  for (int i = 0; i < lines; ++i) {
    const int* w = &down.values[down.at[i]];
    const u8* first = &rows[(size_t)(down.first[i] - top) * padded];
    for (int c = 0; c < length; c += 4 * L) {
      ivec sum[4];
      for (int v = 0; v < 4; ++v) sum[v] = ivec{} + (1 << (BITS - 1));
      const u8* p = first + c;
      for (int k = 0; k < down.count[i]; ++k, p += padded)
        for (int v = 0; v < 4; ++v) sum[v] += widened(bytes(p + v * L)) * w[k];
      u8 block[4 * L];
      for (int v = 0; v < 4; ++v) *(bvec*)(block + v * L) = narrowed(sum[v] >> BITS);
      const int count = length - c < 4 * L ? length - c : 4 * L;
      std::memcpy(out + (size_t)i * length + c, block, count);
    }
  }
  return 0;
}

// --- values ----------------------------------------------------------------------------------------------------------

// out[i] = table[i % 3][in[i]]; table: (3, 256).
void look_up(const u8* in, u8* out, const u8* table, long count) {
  long i = 0;
#if defined(__AVX512VBMI__)
  __m512i t[3][4];
  for (int c = 0; c < 3; ++c)
    for (int q = 0; q < 4; ++q) t[c][q] = _mm512_loadu_si512(table + c * 256 + q * 64);
  __mmask64 second[3], third[3];  // byte j of block b belongs to channel (64 b + j) % 3 = (b + j) % 3
  for (int b = 0; b < 3; ++b) {
    second[b] = third[b] = 0;
    for (int j = 0; j < 64; ++j) {
      second[b] |= (__mmask64)((b + j) % 3 == 1) << j;
      third[b] |= (__mmask64)((b + j) % 3 == 2) << j;
    }
  }
  for (; i + 192 <= count; i += 192)
    for (int b = 0; b < 3; ++b) {
      const __m512i v = _mm512_loadu_si512(in + i + b * 64);
      const __mmask64 upper = _mm512_movepi8_mask(v);
      __m512i found[3];
      for (int c = 0; c < 3; ++c)
        found[c] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(t[c][0], v, t[c][1]),
                                          _mm512_permutex2var_epi8(t[c][2], v, t[c][3]));
      found[0] = _mm512_mask_blend_epi8(second[b], found[0], found[1]);
      _mm512_storeu_si512(out + i + b * 64, _mm512_mask_blend_epi8(third[b], found[0], found[2]));
    }
#endif
  for (; i < count; i += 3)
    for (int c = 0; c < 3; ++c) out[i + c] = table[c * 256 + in[i + c]];
}

void histogram(const u8* in, long count, int32_t* counts) {  // counts: (3, 256)
  std::vector<int32_t> other(768, 0);  // neighbours are often equal: two counters each, so that they need not wait
  std::memset(counts, 0, 768 * sizeof(int32_t));
  long i = 0;
  for (; i + 6 <= count; i += 6)
    for (int c = 0; c < 3; ++c) ++counts[c * 256 + in[i + c]], ++other[c * 256 + in[i + 3 + c]];
  for (; i < count; i += 3)
    for (int c = 0; c < 3; ++c) ++counts[c * 256 + in[i + c]];
  for (int k = 0; k < 768; ++k) counts[k] += other[k];
}

struct Pixels {  // 16 of them, by channel
  ivec r, g, b;
  explicit Pixels(const u8* p) {
    const bvec x = bytes(p), y = bytes(p + L), z = bytes(p + 2 * L);
    const bvec r0 = __builtin_shufflevector(x, y, 0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, -1, -1, -1, -1, -1);
    const bvec g0 = __builtin_shufflevector(x, y, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, -1, -1, -1, -1, -1);
    const bvec b0 = __builtin_shufflevector(x, y, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, -1, -1, -1, -1, -1, -1);
    r = widened(__builtin_shufflevector(r0, z, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29));
    g = widened(__builtin_shufflevector(g0, z, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30));
    b = widened(__builtin_shufflevector(b0, z, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31));
  }
  ivec luma() const { return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; }  // ITU-R 601-2, 16 bits
};

inline int luma(const u8* p) { return (p[0] * 19595 + p[1] * 38470 + p[2] * 7471 + 0x8000) >> 16; }

long luma_sum(const u8* in, long pixels) {
  long i = 0, total = 0;
  while (i + L <= pixels) {
    ivec sum{};
    const long end = i + (long)L * 4096 < pixels ? i + (long)L * 4096 : pixels;  // 4096 * 255 fits each lane
    for (; i + L <= end; i += L) sum += Pixels(in + i * 3).luma();
    for (int k = 0; k < L; ++k) total += sum[k];
  }
  for (; i < pixels; ++i) total += luma(in + i * 3);
  return total;
}

// from + factor * (to - from), cut off to a byte: what is beyond 0..255 is clipped, the rest loses its fraction.
inline u8 blended(int from, int to, float factor) {
  const float value = (float)from + factor * (float)(to - from);
  return value <= 0 ? 0 : value >= 255 ? 255 : (u8)value;
}
inline ivec blended(ivec from, ivec to, float factor) {
  const fvec value = __builtin_convertvector(from, fvec) + factor * __builtin_convertvector(to - from, fvec);
  return __builtin_convertvector(value, ivec);  // toward zero: -0.9 is 0 too
}

void fade(const u8* in, u8* out, long pixels, float factor) {  // grey blended with the picture
  long i = 0;
  for (; i + L <= pixels; i += L) {
    const Pixels p(in + i * 3);
    const ivec grey = p.luma();
    const bvec r = narrowed(blended(grey, p.r, factor)), g = narrowed(blended(grey, p.g, factor)),
               b = narrowed(blended(grey, p.b, factor));
    const bvec rg0 = __builtin_shufflevector(r, g, 0, 16, -1, 1, 17, -1, 2, 18, -1, 3, 19, -1, 4, 20, -1, 5);
    const bvec rg1 = __builtin_shufflevector(r, g, 21, -1, 6, 22, -1, 7, 23, -1, 8, 24, -1, 9, 25, -1, 10, 26);
    const bvec rg2 = __builtin_shufflevector(r, g, -1, 11, 27, -1, 12, 28, -1, 13, 29, -1, 14, 30, -1, 15, 31, -1);
    bvec* to = (bvec*)(out + i * 3);
    to[0] = __builtin_shufflevector(rg0, b, 0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15);
    to[1] = __builtin_shufflevector(rg1, b, 0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15);
    to[2] = __builtin_shufflevector(rg2, b, 26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31);
  }
  for (; i < pixels; ++i) {
    const int grey = luma(in + i * 3);
    for (int c = 0; c < 3; ++c) out[i * 3 + c] = blended(grey, in[i * 3 + c], factor);
  }
}

// The picture smoothed by (1 1 1; 1 5 1; 1 1 1) / 13, its border as it is, blended with the picture.
void sharpen(const u8* in, u8* out, int width, int height, float factor) {
  const long stride = (long)width * 3;
  std::memcpy(out, in, stride * height);  // the border blends with itself
  for (int y = 1; y + 1 < height; ++y) {
    const u8 *p = in + y * stride, *above = p - stride, *below = p + stride;
    u8* to = out + y * stride;
    const auto three = [&](long i) {
      return widened(bytes(above + i)) + widened(bytes(p + i)) + widened(bytes(below + i));
    };
    long i = 3;
    for (; i + L + 3 <= stride; i += L) {
      const ivec own = widened(bytes(p + i)), sum = three(i - 3) + three(i) + three(i + 3) + 4 * own;
      const ivec smooth = (2 * sum + 13) * 40330 >> 20;  // / 26, exactly for every sum of 13 bytes
      *(bvec*)(to + i) = narrowed(blended(smooth, own, factor));
    }
    for (; i + 3 < stride; ++i) {
      int sum = 4 * p[i];
      for (long d = -3; d <= 3; d += 3) sum += above[i + d] + p[i + d] + below[i + d];
      to[i] = blended((2 * sum + 13) / 26, p[i], factor);
    }
  }
}

// --- places ----------------------------------------------------------------------------------------------------------

// out(x, y) = in(matrix (x + 1/2, y + 1/2)), the nearest pixel, `fill` outside; `m`: six numbers with 16 bits behind the point.
void move(const u8* in, u8* out, int width, int height, const int* m, const u8* fill) {
  const long stride = (long)width * 3;
  for (int y = 0; y < height; ++y) {
    u8* row = out + y * stride;
    const int x0 = m[2] + y * m[1], y0 = m[5] + y * m[4];
    const auto inside = [&](int x) {
      const int at_x = (x0 + x * m[0]) >> 16, at_y = (y0 + x * m[3]) >> 16;
      return at_x >= 0 && at_x < width && at_y >= 0 && at_y < height;
    };
    int from = 0, to = width;  // what is inside is one run: the picture is convex
    while (from < to && !inside(from)) ++from;
    while (to > from && !inside(to - 1)) --to;
    for (int x = 0; x < from; ++x) std::memcpy(row + x * 3, fill, 3);
    for (int x = to; x < width; ++x) std::memcpy(row + x * 3, fill, 3);
    if (m[0] == 1 << 16 && m[3] == 0) {
      if (from < to)
        std::memcpy(row + from * 3, in + (y0 >> 16) * stride + ((x0 >> 16) + from) * 3, (size_t)(to - from) * 3);
      continue;
    }
    int at_x = x0 + from * m[0], at_y = y0 + from * m[3];
    for (int x = from; x < to; ++x, at_x += m[0], at_y += m[3])
      std::memcpy(row + x * 3, in + (at_y >> 16) * stride + (at_x >> 16) * 3, 3);
  }
}

}  // namespace

extern "C" {

int effnet_resize(const u8* in, long stride, int width, int height, const float* box, const int* whole,
                  const int* window, u8* out, int cubic, int flip) {
  return resize(in, stride, width, height, box, whole, window, out, cubic, flip);
}

int effnet_look_up(const u8* in, u8* out, const u8* table, long bytes) { return look_up(in, out, table, bytes), 0; }

int effnet_histogram(const u8* in, long bytes, int32_t* counts) { return histogram(in, bytes, counts), 0; }

int effnet_luma_sum(const u8* in, long pixels, int64_t* total) { return *total = luma_sum(in, pixels), 0; }

int effnet_fade(const u8* in, u8* out, long pixels, float factor) { return fade(in, out, pixels, factor), 0; }

int effnet_sharpen(const u8* in, u8* out, int width, int height, float factor) {
  return sharpen(in, out, width, height, factor), 0;
}

int effnet_move(const u8* in, u8* out, int width, int height, const int* matrix, const u8* fill) {
  return move(in, out, width, height, matrix, fill), 0;
}

}  // extern "C"
