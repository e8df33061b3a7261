// One call of the operator. Plain data and a C interface, free of torch and of CUDA's headers.
#pragma once

#include <cstdint>

namespace fastprefix {

// What is null or has no elements is not read. Strides along a dimension of one element may be 0. Of a packed bank P is the
// sum of the lengths, and N their number; an id outside of [0, N) is none, and lengths are taken as 0 to P.
//
// B samples, H query heads, H_kv key/value heads, G = H / H_kv, S query tokens, T content keys, P prefix tokens,
// N prefixes of a bank, D and D_v head dims. Strides are in elements, and the last dimension's is 1.
struct Rows {
  void* data;
  int64_t batch, head, row;
};

// Whole numbers of 4 or 8 bytes; a null pointer stands for none.
struct Integers {
  const void* data;
  int64_t bytes;    // of one
  int64_t batch;    // strides in numbers
  int64_t row;
};

enum Dtype : int32_t { BF16 = 0, F16 = 1 };

// How the keys are read. SPLIT_KV is Flash-Decoding (Dao et al. 2023): each sample reads its prefix, then its content.
// CASCADE reads each tile of the prefix once for the rows of all samples (Juravsky et al. 2024, Hydragen). AUTO takes the
// one that is estimated to be faster.
enum Route : int32_t { AUTO = 0, SPLIT_KV = 1, CASCADE = 2 };

// T and P are below this, so that sums and differences of positions are whole numbers of 32 bits.
constexpr int32_t MOST_KEYS = int32_t{1} << 29;

struct AttentionCall {
  Rows q;                    // [B, H, S, D]
  Rows k, v;                 // [B, H_kv, T, D], [B, H_kv, T, D_v]
  Rows prefix_k, prefix_v;   // [N, H_kv, P, D]; packed, [H_kv, P of all, D], and batch is 0
  Rows o;                    // [B, H, S, D_v], written
  float* lse;                // [B, H, S], written: natural log-sum-exp, -inf where a row sees no key
  const float* sinks;        // [H], or null
  const float* prefix_bias;  // [N, H_kv, P]; packed, [H_kv, P of all]: added to the scores of tokens after the cap. Those
                             // of -1e37 and below, or nan, hide the token. Or null
  Integers prefix_ids;       // [B], or [B, S] with row strides: -1 is none. Null: prefix 0 for all
  Integers prefix_lens;      // [N], or null: all have P tokens
  Integers q_start;          // [B] (or stride 0), or null: start
  Integers segments;         // [B, T], compared by their low 32 bits; or null
  const uint8_t* padding;    // [B, T], 0 hides a key; or null
  int64_t padding_batch, padding_key;
  int64_t start;             // content position of the first query row
  int32_t B, H, H_kv, S, T, D, D_v, P, N;
  int32_t window;            // up to MOST_KEYS; 0: none
  int32_t causal, packed, ids_by_row;
  float scale, softcap;      // softcap 0: none
  Dtype dtype;
  Route route;
  int32_t device;            // which one of the machine's
};

}  // namespace fastprefix

// The route that the call takes, and how many bytes of workspace, aligned to 16, it needs.
extern "C" int fastprefix_decode_route(const fastprefix::AttentionCall* call);
extern "C" int64_t fastprefix_decode_workspace(const fastprefix::AttentionCall* call);
// Launches the call on a stream of its device. Null, or in one line what is wrong: words that stay where they are. The host
// does not wait, and what is launched is the same whatever the tensors hold, so that it may be captured in a CUDA graph.
extern "C" const char* fastprefix_decode(const fastprefix::AttentionCall* call, void* workspace, void* stream);
// The forward of many query tokens, by a kernel of its own on compute capability 9.0. It needs no workspace, and takes no
// route.
extern "C" const char* fastprefix_fused(const fastprefix::AttentionCall* call, void* stream);
