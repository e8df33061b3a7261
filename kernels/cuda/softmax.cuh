// The running softmax of FlashAttention-2 (Dao 2023), base 2: maximum m, sum l and unnormalised acc of each row.
#pragma once

#include "layouts.cuh"

namespace fastprefix {

// tanh by the exponential that the hardware has; exact at both ends.
FP_DEVICE float tanh_approx(float x) { return 1.0f - 2.0f * rcp_approx(ex2_approx(x * (2.0f * LOG2E)) + 1.0f); }

// A product q k as a base-2 logit. Softcap 0 is none.
struct Logits {
  float scale, cap;
  FP_DEVICE Logits of(float scale, float softcap) {
    return softcap == 0.0f ? Logits{scale * LOG2E, 0.0f} : Logits{scale / softcap, softcap * LOG2E};
  }
};
FP_DEVICE float logit(float product, const Logits& to) {
  return to.cap == 0.0f ? product * to.scale : tanh_approx(product * to.scale) * to.cap;
}

template <int N, int M>
FP_DEVICE void to_logits(float (&x)[N][M], const Logits& to) {
  // One test for all: the compiler would ask for each.
  if (to.cap == 0.0f) {
    FP_UNROLL
    for (int i = 0; i < N; i++) FP_UNROLL for (int j = 0; j < M; j++) x[i][j] *= to.scale;
  } else {
    FP_UNROLL
    for (int i = 0; i < N; i++) FP_UNROLL for (int j = 0; j < M; j++) x[i][j] = tanh_approx(x[i][j] * to.scale) * to.cap;
  }
}

// What logits are shifted by: a row that has seen nothing keeps m = -inf, and shifting by 0 leaves weight 0 instead of nan.
FP_DEVICE float shift_of(float m) { return m == NEGATIVE_INFINITY ? 0.0f : m; }

// One step of the running softmax of a lane's two rows, over N keys as an accumulator holds them: x becomes their weights,
// and o's rows are to be multiplied with alpha. m is before the scale, which is above 0; l is of this lane's keys.
template <int ELEMENTS>
FP_DEVICE void softmax_step(float (&x)[ELEMENTS], float (&m)[2], float (&l)[2], float (&alpha)[2], float scale) {
  FP_UNROLL
  for (int half = 0; half < 2; half++) {
    float most = m[half];
    FP_UNROLL
    for (int j = 0; j < ELEMENTS / 4; j++) most = larger(most, larger(x[4 * j + 2 * half], x[4 * j + 2 * half + 1]));
    most = larger(most, shfl_xor(most, 1));
    most = larger(most, shfl_xor(most, 2));
    const float shift = shift_of(most) * scale;
    alpha[half] = ex2_approx(m[half] * scale - shift);
    float sum = 0.0f;
    FP_UNROLL
    for (int j = 0; j < ELEMENTS / 4; j++) {
      FP_UNROLL
      for (int e = 4 * j + 2 * half; e < 4 * j + 2 * half + 2; e++) {
        x[e] = ex2_approx(x[e] * scale - shift);
        sum += x[e];
      }
    }
    m[half] = most;
    l[half] = l[half] * alpha[half] + sum;
  }
}
template <int ELEMENTS>
FP_DEVICE void rescale(float (&o)[ELEMENTS], const float (&alpha)[2]) {
  FP_UNROLL for (int e = 0; e < ELEMENTS; e++) o[e] *= alpha[e / 2 % 2];
}

// The end of a row: what its acc is multiplied with, and the natural log-sum-exp. A sink (gpt-oss) is a part with o = 0;
// its base-2 logit must not overflow to "nothing at all".
struct Finish {
  float weight, lse;
};
FP_DEVICE Finish finish(float m, float l, const float* sinks, int h) {
  if (!sinks) return {1.0f / (l == 0.0f ? 1.0f : l), (m + lg2_approx(l == 0.0f ? 1.0f : l)) * LN2};
  const float sink = ld_global(sinks + h);
  const float sink_2 = sink == NEGATIVE_INFINITY ? sink : larger(sink, -2e38f) * LOG2E;
  const float both = larger(m, sink_2), weight = ex2_approx(m - shift_of(both));
  const float sum = l * weight + ex2_approx(sink_2 - shift_of(both)), divisor = sum == 0.0f ? 1.0f : sum;
  return {weight / divisor, m == NEGATIVE_INFINITY ? sink : (both + lg2_approx(divisor)) * LN2};
}

}  // namespace fastprefix
