// tensors: sizes and steps, scale, the result's gradient, q, k, v, the result, the logarithms; gradients of q, k, v.
extern "C" void run(long batch, long threads, float *workspace, void *const *tensors) {
  const long *numbers = (const long *)tensors[0], *steps = numbers + 5;
  const Sizes s(numbers, (const float *)tensors[1]);
  Rows r[9];
  for (int i = 0; i < 9; ++i) r[i] = rows(tensors[2 + i], steps + 3 * i);
  const long jobs = batch * s.heads, columns = rounded(s.depth, LANES);
  const long each = 2 * s.depth * s.wide + 3 * s.keys * s.deep + 3 * s.rows * s.deep + 2 * s.rows * s.row;
#pragma omp parallel num_threads(threads)
  {
    const long count = omp_get_num_threads(), thread = omp_get_thread_num();
    float *key_columns = workspace + thread * each, *value_columns = key_columns + s.depth * s.wide;
    float *key_rows = value_columns + s.depth * s.wide, *dk = key_rows + s.keys * s.deep, *dv = dk + s.keys * s.deep;
    float *query_rows = dv + s.keys * s.deep, *gradient_rows = query_rows + s.rows * s.deep;
    float *dq = gradient_rows + s.rows * s.deep, *p = dq + s.rows * s.deep, *dp = p + s.rows * s.row;
    for (long item = jobs * thread / count; item < jobs * (thread + 1) / count; ++item) {
      float *at[9];
      for (int i = 0; i < 9; ++i) at[i] = r[i].of(item, s.heads);
      pack_columns(at[2], r[2].token, s.keys, s.depth, key_columns);
      pack_columns(at[3], r[3].token, s.keys, s.depth, value_columns);
      pack_rows(at[2], r[2].token, s.keys, s.depth, key_rows);
      for (long first = 0; first < s.queries; first += s.rows) {
        const long n = least(s.rows, s.queries - first);
        const float *grad = at[0] + first * r[0].token, *q = at[1] + first * r[1].token;
        pack_rows(q, r[1].token, n, s.depth, query_rows);
        pack_rows(grad, r[0].token, n, s.depth, gradient_rows);
        product(n, s.wide, s.depth, q, r[1].token, 1, key_columns, p, s.row, 0);
        product(n, s.wide, s.depth, grad, r[0].token, 1, value_columns, dp, s.row, 0);
        for (long i = 0; i < n; ++i) {
          const float *result = at[4] + (first + i) * r[4].token, lse = at[5][(first + i) * r[5].token];
          float mean = 0.0f, *weight = p + i * s.row, *change = dp + i * s.row;
          for (long d = 0; d < s.depth; ++d) mean += grad[i * r[0].token + d] * result[d];
#pragma omp simd
          for (long j = 0; j < s.keys; ++j) {
            weight[j] = exponential(s.scale * weight[j] - lse);
            change[j] = s.scale * weight[j] * (change[j] - mean);
          }
        }
        product(n, columns, s.keys, dp, s.row, 1, key_rows, dq, s.deep, 0);
        store_rows(dq, s.deep, n, s.depth, 1.0f, at[6] + first * r[6].token, r[6].token);
        product(s.keys, columns, n, dp, 1, s.row, query_rows, dk, s.deep, first > 0);
        product(s.keys, columns, n, p, 1, s.row, gradient_rows, dv, s.deep, first > 0);
      }
      store_rows(dk, s.deep, s.keys, s.depth, 1.0f, at[7], r[7].token);
      store_rows(dv, s.deep, s.keys, s.depth, 1.0f, at[8], r[8].token);
    }
  }
}
