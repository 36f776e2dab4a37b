// Matrix products of float32: a block of rows against a panel of columns, the sums in registers.
// LANES floats fill a vector register and MOST_ROWS rows its sums; both are defined in front of this.
enum { PANEL = 2 * LANES };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
static inline long rounded(long n, long to) { return (n + to - 1) / to * to; }
static inline long least(long a, long b) { return a < b ? a : b; }

// `b` lies in panels, [depth][PANEL] each; element k of row r of `a` is a[r * row + k * step].
template <int ROWS, int VECS>
static void block(long depth, const float *a, long row, long step, const float *b, float *c, long c_row, int add) {
  vec sum[ROWS][VECS];
  const float *at[(ROWS + 2) / 3];  // a third of the pointers: what lies between is within reach of an address
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r += 3) at[r / 3] = a + r * row;
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) sum[r][v] = add ? *(const vec *)(c + r * c_row + v * LANES) : vec{};
  for (long k = 0; k < depth; ++k, b += PANEL) {
    vec right[VECS];
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) right[v] = *(const vec *)(b + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const float left = at[r / 3][(r % 3) * row];
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) sum[r][v] += left * right[v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r += 3) at[r / 3] += step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) *(vec *)(c + r * c_row + v * LANES) = sum[r][v];
}
template <int ROWS>
static void some_rows(int rows, int vecs, long depth, const float *a, long row, long step, const float *b, float *c,
                      long c_row, int add) {
  if (rows == ROWS) {
    if (vecs == 2) block<ROWS, 2>(depth, a, row, step, b, c, c_row, add);
    else block<ROWS, 1>(depth, a, row, step, b, c, c_row, add);
  } else if constexpr (ROWS > 1) {
    some_rows<ROWS - 1>(rows, vecs, depth, a, row, step, b, c, c_row, add);
  }
}
// c [rows x columns] = a b, or c + a b; columns are a multiple of LANES.
static void product(long rows, long columns, long depth, const float *a, long row, long step, const float *b, float *c,
                    long c_row, int add) {
  const long blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (long n = 0; n < columns; n += PANEL, b += depth * PANEL)
    for (long i = 0; i < blocks; ++i) {
      const long first = rows * i / blocks, end = rows * (i + 1) / blocks;
      some_rows<MOST_ROWS>(end - first, columns - n < PANEL ? 1 : 2, depth, a + first * row, row, step, b,
                           c + first * c_row + n, c_row, add);
    }
}
