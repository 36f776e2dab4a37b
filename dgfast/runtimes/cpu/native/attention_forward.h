// tensors: sizes and steps, scale, q, k, v; the result and the logarithm of each query's sum of exponentials.
extern "C" void run(long batch, long threads, float *workspace, void *const *tensors) {
  const long *numbers = (const long *)tensors[0], *steps = numbers + 5;
  const Sizes s(numbers, (const float *)tensors[1]);
  const Rows q = rows(tensors[2], steps), k = rows(tensors[3], steps + 3), v = rows(tensors[4], steps + 6);
  const Rows out = rows(tensors[5], steps + 9), lse = rows(tensors[6], steps + 12);
  const long blocks = (s.queries + s.rows - 1) / s.rows, jobs = batch * s.heads * blocks;
#pragma omp parallel num_threads(threads)
  {
    const long count = omp_get_num_threads(), thread = omp_get_thread_num();
    float *keys = workspace + thread * (s.depth * s.wide + s.keys * s.deep + s.rows * (s.row + s.deep));
    float *values = keys + s.depth * s.wide, *scores = values + s.keys * s.deep, *result = scores + s.rows * s.row;
    long packed = -1;
    for (long job = jobs * thread / count; job < jobs * (thread + 1) / count; ++job) {
      const long item = job / blocks, first = job % blocks * s.rows, n = least(s.rows, s.queries - first);
      if (item != packed) {
        pack_columns(k.of(item, s.heads), k.token, s.keys, s.depth, keys);
        pack_rows(v.of(item, s.heads), v.token, s.keys, s.depth, values);
        packed = item;
      }
      product(n, s.wide, s.depth, q.of(item, s.heads) + first * q.token, q.token, 1, keys, scores, s.row, 0);
      float factor[MOST_QUERIES];
      for (long r = 0; r < n; ++r) {
        float *p = scores + r * s.row, most = p[0], sum = 0.0f;
#pragma omp simd reduction(max : most)
        for (long i = 0; i < s.keys; ++i) most = p[i] > most ? p[i] : most;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < s.keys; ++i) {
          p[i] = exponential(s.scale * (p[i] - most));
          sum += p[i];
        }
        factor[r] = 1.0f / sum;
        lse.of(item, s.heads)[(first + r) * lse.token] = s.scale * most + __builtin_logf(sum);
      }
      product(n, rounded(s.depth, LANES), s.keys, scores, s.row, 1, values, result, s.deep, 0);
      for (long r = 0; r < n; ++r)
        store_rows(result + r * s.deep, s.deep, 1, s.depth, factor[r], out.of(item, s.heads) + (first + r) * out.token, 0);
    }
  }
}
