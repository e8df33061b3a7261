// One call of the backward. Plain data and a C interface, free of torch and of CUDA's headers.
#pragma once

#include "attention_call.h"

namespace fastprefix {

struct BackwardCall {
  AttentionCall forward;     // its o and lse are read
  Rows dout;                 // [B, H, S, D_v], the gradient of o
  // Written where data is not null; the others are not computed.
  Rows dq;                   // [B, H, S, D]
  Rows dk, dv;               // [B, H_kv, T, D], [B, H_kv, T, D_v]
  float *dprefix_k, *dprefix_v;   // [N, H_kv, P, D] and D_v; packed, [H_kv, P of all, D]
  float* dprefix_bias;            // as forward.prefix_bias, which is there too
};

}  // namespace fastprefix

// As of the forward.
extern "C" int64_t fastprefix_backward_workspace(const fastprefix::BackwardCall* call);
extern "C" const char* fastprefix_backward(const fastprefix::BackwardCall* call, void* workspace, void* stream);
