// One call of the operator, as the kernels see it: addresses, strides and numbers, nothing of torch.
//
// B batch, H query heads, K key/value heads, G = H / K, S query tokens, T content keys, P prefix tokens, D head dim of
// q and k, E head dim of v. All strides count elements; the last dimension of every tensor has stride 1.
#pragma once

#include <cstdint>

namespace fastprefix {

enum class Type : int32_t { F32, BF16, F16, BOOL };

constexpr int64_t size_of(Type type) { return type == Type::F32 ? 4 : type == Type::BOOL ? 1 : 2; }

// [batch, head, row, :]
struct Heads {
  char* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  Type type = Type::F32;

  char* at(int64_t b, int64_t h, int64_t s) const {
    return data + (b * batch + h * head + s * row) * size_of(type);
  }
};

// The query rows' prefixes. Without ids there is one, prefix 0, for all rows. Prefix n begins at row first[n] of entry n
// of a padded bank, or of the one entry of a packed bank, and has length[n] tokens.
struct Prefixes {
  Heads k, v;                       // batch: the stride of a padded bank's entries, else 0
  int64_t tokens = 0;               // rows of an entry
  bool packed = false;
  int64_t number = 1;               // N
  const int64_t* ids = nullptr;     // by sample, or by sample and row; -1 is none
  int64_t ids_batch = 0, ids_row = 0;
  const int64_t* first = nullptr;   // [N]
  const int64_t* length = nullptr;  // [N]
  const float* bias = nullptr;      // [N, K, tokens], or [K, tokens] packed; contiguous, added to scores

  // Number of the first token of prefix n and head h in a contiguous [N, K, tokens], or [K, tokens] of a packed bank.
  int64_t token(int64_t K, int64_t n, int64_t h) const { return ((packed ? 0 : K * n) + h) * tokens + first[n]; }
};

struct Call {
  int64_t B, H, K, S, T, D, E;
  Heads q, k, v, o;
  float* lse;  // [B, H, S], contiguous, natural logarithm
  Prefixes prefix;
  float scale;
  bool causal;
  float softcap = 0.f;               // 0: none
  const int64_t* start = nullptr;    // [B], position of the first query row
  int64_t window = 0;                // 0: none
  const uint8_t* padding = nullptr;  // [B, T], nonzero = visible
  int64_t padding_batch = 0, padding_key = 0;
  const int64_t* segments = nullptr;  // [B, T]
  int64_t segments_batch = 0, segments_key = 0;
  const void* bias = nullptr;  // [B, H, S, T] by strides
  Type bias_type = Type::F32;
  int64_t bias_batch = 0, bias_head = 0, bias_row = 0, bias_key = 0;
  const float* sinks = nullptr;  // [H]

  int64_t groups() const { return H / K; }
};

// What the backward is given, and where it writes; null where nothing is needed. All gradients are fp32.
struct Gradients {
  Heads dout;
  Heads q, k, v;                       // as q, k and v of the call, in contiguous [B, S, H, :] storage
  float* prefix_k = nullptr;           // like prefix_k, contiguous
  float* prefix_v = nullptr;
  float* prefix_bias = nullptr;        // like the prefix's bias
};

void forward(const Call& call);
void backward(const Call& call, const Gradients& gradients);

// "avx512", "avx2" or "baseline": the best that the processor has and $ATEN_CPU_CAPABILITY allows.
const char* instruction_set();

// Run task(0) ... task(count - 1), on all of torch's threads unless it is little work. Defined beside torch.
using Task = void (*)(const void* context, int64_t index);
void run_tasks(int64_t count, bool serial, Task task, const void* context);

}  // namespace fastprefix
