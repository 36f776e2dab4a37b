// Attention of [batch, heads, tokens, depth] in float32: a block of queries at a time, all their keys at once.
struct Rows {  // a tensor, and the steps to its next sample, head and token
  float *data;
  long batch, head, token;
  float *of(long item, long heads) const { return data + item / heads * batch + item % heads * head; }
};
static Rows rows(void *data, const long *steps) { return Rows{(float *)data, steps[0], steps[1], steps[2]}; }

// Tokens as the columns of the right factor: [depth][tokens] in panels.
static void pack_columns(const float *x, long token, long tokens, long depth, float *to) {
  for (long n = 0; n < tokens; n += PANEL)
    for (long d = 0; d < depth; ++d, to += PANEL)
      for (long l = 0; l < PANEL; ++l) to[l] = n + l < tokens ? x[(n + l) * token + d] : 0.0f;
}
// Tokens as its rows: [tokens][depth] in panels.
static void pack_rows(const float *x, long token, long tokens, long depth, float *to) {
  for (long d = 0; d < depth; d += PANEL)
    for (long n = 0; n < tokens; ++n, to += PANEL)
      for (long l = 0; l < PANEL; ++l) to[l] = d + l < depth ? x[n * token + d + l] : 0.0f;
}
static void store_rows(const float *from, long row, long tokens, long depth, float factor, float *to, long token) {
  for (long n = 0; n < tokens; ++n)
    for (long d = 0; d < depth; ++d) to[n * token + d] = factor * from[n * row + d];
}
struct Sizes {
  long heads, queries, keys, depth, rows;  // rows: queries of a block
  long wide, deep, row;                    // keys and depth as whole panels; floats of a row of scores
  float scale;
  Sizes(const long *size, const float *scale)
      : heads(size[0]), queries(size[1]), keys(size[2]), depth(size[3]), rows(size[4]), wide(rounded(keys, PANEL)),
        deep(rounded(depth, PANEL)), row(wide + LANES), scale(*scale) {}
};
