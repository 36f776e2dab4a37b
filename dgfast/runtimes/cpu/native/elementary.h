// Functions of one number, for generated and handwritten code; stands in front of it.
#include <stdint.h>
extern "C" int omp_get_thread_num(void), omp_get_num_threads(void);

static inline float exponential(float x) {  // Cephes: within 2 units in the last place; NaN stays NaN
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = __builtin_rintf(x * 1.44269504088896341f);
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
  return y * power.f;
}
static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
static inline float silu(float x) { return x * sigmoid(x); }
static inline float silu_backward(float grad, float x) {
  const float s = sigmoid(x);
  return grad * s * (1.0f + x * (1.0f - s));
}
static inline float gelu_tanh(float x) { return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }
static inline float from_bfloat16(uint16_t x) {
  union { uint32_t i; float f; } value = {(uint32_t)x << 16};
  return value.f;
}
static inline uint16_t to_bfloat16(float x) {  // to nearest, ties to even
  union { float f; uint32_t i; } value = {x};
  return x != x ? 0x7fc0 : (uint16_t)((value.i + 0x7fff + ((value.i >> 16) & 1)) >> 16);
}
static inline void zero(float *sums, long channels) { for (long c = 0; c < channels; ++c) sums[c] = 0.0f; }
static void averages(const float *sums, long mates, long stride, long channels, long groups, long pixels, float *to) {
  const long each = channels / groups;
  for (long g = 0; g < groups; ++g) {
    float total = 0.0f;
    for (long m = 0; m < mates; ++m)
      for (long c = g * each; c < (g + 1) * each; ++c) total += sums[m * stride + c];
    for (long c = g * each; c < (g + 1) * each; ++c) to[c] = total / (float)(pixels * each);
  }
}
