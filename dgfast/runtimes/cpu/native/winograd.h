// A 3 x 3 convolution (stride 1, padding 1) of channels-last images by Winograd's F(4 x 4, 3 x 3): winograd.py says how.
// tensors: sizes, x, weights as 36 matrices in panels, bias or nothing, the result.
enum { SIDE = 4, REACH = SIDE + 2, POINTS = REACH * REACH };
enum { GAP = 5 * LANES };  // between two points' matrices: else their columns fall on the same lines of the cache
static const float P = 0.625f, Q = 1.5f;
static const float zeros[MOST_CHANNELS] = {};

static inline void to_points(vec d0, vec d1, vec d2, vec d3, vec d4, vec d5, vec *t) {
  const vec even_p = d4 - Q * Q * d2, odd_p = P * (d3 - Q * Q * d1);
  const vec even_q = d4 - P * P * d2, odd_q = Q * (d3 - P * P * d1);
  t[0] = P * P * (Q * Q * d0 - d2) + (d4 - Q * Q * d2);
  t[1] = even_p + odd_p;
  t[2] = even_p - odd_p;
  t[3] = even_q + odd_q;
  t[4] = even_q - odd_q;
  t[5] = P * P * (Q * Q * d1 - d3) + (d5 - Q * Q * d3);
}
static inline void from_points(vec m0, vec m1, vec m2, vec m3, vec m4, vec m5, vec *y) {
  const vec even_p = m1 + m2, odd_p = P * (m1 - m2), even_q = m3 + m4, odd_q = Q * (m3 - m4);
  y[0] = m0 + even_p + even_q;
  y[1] = odd_p + odd_q;
  y[2] = P * P * even_p + Q * Q * even_q;
  y[3] = P * P * odd_p + Q * Q * odd_q + m5;
}
struct Tile {
  long sample, y, x;  // of its first pixel
  Tile(long number, long down, long across)
      : sample(number / (down * across)), y(number / across % down * SIDE), x(number % across * SIDE) {}
};
static void read_tile(Tile tile, const float *x, long height, long width, long channels, float *to, long step) {
  const float *pixel[POINTS];
  for (long i = 0; i < REACH; ++i)
    for (long j = 0; j < REACH; ++j) {
      const long v = tile.y + i - 1, h = tile.x + j - 1;
      const int inside = v >= 0 && v < height && h >= 0 && h < width;
      pixel[i * REACH + j] = inside ? x + ((tile.sample * height + v) * width + h) * channels : zeros;
    }
  for (long c = 0; c < channels; c += LANES) {
    vec half[REACH][REACH], d[REACH], t[REACH];
#pragma GCC unroll 6
    for (int j = 0; j < REACH; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < REACH; ++i) d[i] = *(const vec *)(pixel[i * REACH + j] + c);
      to_points(d[0], d[1], d[2], d[3], d[4], d[5], t);
#pragma GCC unroll 6
      for (int i = 0; i < REACH; ++i) half[i][j] = t[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < REACH; ++i) {
      to_points(half[i][0], half[i][1], half[i][2], half[i][3], half[i][4], half[i][5], t);
#pragma GCC unroll 6
      for (int j = 0; j < REACH; ++j) *(vec *)(to + (i * REACH + j) * step + c) = t[j];
    }
  }
}
static void write_tile(Tile tile, const float *from, long step, const float *bias, long height, long width,
                       long filters, float *out) {
  for (long f = 0; f < filters; f += LANES) {
    vec half[SIDE][REACH], m[REACH], y[SIDE];
#pragma GCC unroll 6
    for (int j = 0; j < REACH; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < REACH; ++i) m[i] = *(const vec *)(from + (i * REACH + j) * step + f);
      from_points(m[0], m[1], m[2], m[3], m[4], m[5], y);
#pragma GCC unroll 4
      for (int i = 0; i < SIDE; ++i) half[i][j] = y[i];
    }
    const vec shift = bias ? *(const vec *)(bias + f) : vec{};
    for (long i = 0; i < SIDE && tile.y + i < height; ++i) {
      from_points(half[i][0], half[i][1], half[i][2], half[i][3], half[i][4], half[i][5], y);
      float *to = out + ((tile.sample * height + tile.y + i) * width + tile.x) * filters + f;
      for (long j = 0; j < SIDE && tile.x + j < width; ++j) *(vec *)(to + j * filters) = y[j] + shift;
    }
  }
}
extern "C" void run(long samples, long threads, float *workspace, void *const *tensors) {
  const long *size = (const long *)tensors[0];
  const long height = size[0], width = size[1], channels = size[2], filters = size[3];
  const long chunk = size[4], shared = size[5];  // tiles at a time; whether all cores work on the same ones
  const float *x = (const float *)tensors[1], *weights = (const float *)tensors[2], *bias = (const float *)tensors[3];
  float *out = (float *)tensors[4];
  const long down = rounded(height, SIDE) / SIDE, across = rounded(width, SIDE) / SIDE, tiles = samples * down * across;
  const long panels = rounded(filters, PANEL) / PANEL, jobs = POINTS * panels;
  const long in_step = chunk * channels + GAP, out_step = chunk * filters + GAP;
#pragma omp parallel num_threads(threads)
  {
    const long count = omp_get_num_threads(), thread = omp_get_thread_num(), together = shared ? count : 1;
    const long crews = count / together, crew = thread / together, part = thread % together;
    float *in = workspace + crew * POINTS * (in_step + out_step), *sums = in + POINTS * in_step;
    const long end = tiles * (crew + 1) / crews;
    for (long start = tiles * crew / crews; start < end; start += chunk) {
      const long n = least(chunk, end - start);
      for (long t = n * part / together; t < n * (part + 1) / together; ++t)
        read_tile(Tile(start + t, down, across), x, height, width, channels, in + t * channels, in_step);
      if (together > 1) {
#pragma omp barrier
      }
      for (long job = jobs * part / together; job < jobs * (part + 1) / together; ++job) {
        const long point = job / panels, f = job % panels * PANEL;
        product(n, least(PANEL, filters - f), channels, in + point * in_step, channels, 1,
                weights + job * channels * PANEL, sums + point * out_step + f, filters, 0);
      }
      if (together > 1) {
#pragma omp barrier
      }
      for (long t = n * part / together; t < n * (part + 1) / together; ++t)
        write_tile(Tile(start + t, down, across), sums + t * filters, out_step, bias, height, width, filters, out);
    }
  }
}
