// The functions that are built once for each instruction set, and what they are given.
#pragma once

#include "call.h"

namespace fastprefix {

constexpr int ROWS = 64;  // query rows of a block
constexpr int KEYS = 64;  // keys of a tile
constexpr int64_t WIDEST = 256;  // head dim

// Query rows that are computed together: of one sample where they meet content, of any where they meet a prefix.
struct RowBlock {
  int64_t n = 0;
  const void* q[ROWS];
  void* o[ROWS];
  float* lse[ROWS];
  float sink[ROWS];       // -inf without one
  int64_t low[ROWS], high[ROWS];  // content keys low..high are within causality and window; the row sees no other
  int64_t segment[ROWS];
  const char* bias[ROWS];  // of the row's key 0
  const void* dout[ROWS];
  float* dq[ROWS];
};

// Keys first..last - 1 of one head. Row j of k lies k_row * j elements after k.
struct KeyRange {
  const void* k;
  const void* v;
  int64_t k_row, v_row;
  Type type;
  int64_t first, last;
  bool content;  // masks, window, segments and bias apply
  const uint8_t* padding;  // of the block's sample, or null
  const int64_t* segments;
  const float* bias;       // of a prefix: of its key 0, or null
  float* dbias;            // likewise its gradient
  float *dk, *dv;       // backward: row j at dk + j * dk_row, null where not needed
  int64_t dk_row, dv_row;
  bool add;  // backward: add to dk, dv and dbias instead of writing
};

// What is the same for all blocks of a call.
struct Shape {
  int64_t D, E;
  Type type;  // of q and o, in which keys of another type are read
  float scale, softcap;
  int64_t padding_key, segments_key, bias_key;
  bool has_bias;
  Type bias_type;
};

// An unfinished softmax of a block's rows: o [n, E] is not divided by l.
struct Partial {
  float *o, *m, *l;
};

struct Kernels {
  const char* name;
  // Attend over up to two runs of keys, one after the other. Without `partial` the rows' o and lse are written.
  void (*attend)(const Shape&, const RowBlock&, const KeyRange* ranges, int count, const Partial* partial, float* scratch);
  // The partial results of a block's rows as one: part p of row i is at o[p] + i * E, m[p] + i and l[p] + i.
  void (*combine)(const Shape&, const RowBlock&, const Partial* parts, int64_t count, float* scratch);
  // Gradients of one block; rows.dq is written, or with `add_dq` added to, where it is not null.
  void (*backward)(const Shape&, const RowBlock&, const KeyRange* ranges, int count, bool add_dq, float* scratch);
};

// Floats of scratch memory that a call of the functions needs.
constexpr int64_t scratch_size(int64_t D, int64_t E) {
  const int64_t d = (D + 15) / 16 * 16, e = (E + 15) / 16 * 16;
  return ROWS * (4 * d + 4 * e) + 3 * KEYS * ROWS + KEYS * (d + e) + 8 * ROWS + 256;
}

const Kernels& kernels();

// Memory of this thread, 64-byte aligned: for a task, and for what a call's tasks leave each other, of which much is
// given back when the call ends.
float* scratch(int64_t floats);
float* workspace(int64_t floats);
void release_workspace();

namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace baseline { extern const Kernels kernels; }

}  // namespace fastprefix
