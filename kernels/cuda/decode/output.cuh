// Four columns of a finished row, and its log-sum-exp.
#pragma once

#include "decode/params.cuh"
#include "softmax.cuh"

namespace fastprefix {

struct alignas(8) Packed4 {
  uint32_t x[2];
};

template <class T>
FP_DEVICE void write_row(const AttentionCall& c, const Place& place, int column, const Float4& acc, float m, float l) {
  const Finish end = finish(m, l, c.sinks, place.h);
  const Packed4 packed{{pack<T>(acc.x[0] * end.weight, acc.x[1] * end.weight), pack<T>(acc.x[2] * end.weight, acc.x[3] * end.weight)}};
  st_global(reinterpret_cast<Packed4*>(static_cast<uint16_t*>(c.o.data) + offset(c.o, place) + column), packed);
  if (column == 0) st_global(c.lse + place_in_lse(c, place), end.lse);
}

}  // namespace fastprefix
