// Tells the emulator which memory a call's kernels may touch, by its sizes and strides.
#pragma once

#include "backward_call.h"
#include "launch.cuh"

namespace fastprefix {

inline void add_rows(const char* name, const Rows& x, int64_t batch, int64_t heads, int64_t rows, int64_t columns, bool writable = false) {
  if (batch * heads * rows * columns == 0) return;
  const int64_t elements = (batch - 1) * x.batch + (heads - 1) * x.head + (rows - 1) * x.row + columns;
  emulator::global_memory.add(name, x.data, elements * 2, writable);
}

inline void add_integers(const char* name, const Integers& x, int64_t batch, int64_t rows) {
  if (!x.data || batch * rows == 0) return;
  emulator::global_memory.add(name, x.data, ((batch - 1) * x.batch + (rows - 1) * x.row + 1) * x.bytes, false);
}

inline void add_inputs(const AttentionCall& c, bool outputs) {
  emulator::global_memory.clear();
  add_rows("q", c.q, c.B, c.H, c.S, c.D);
  add_rows("k", c.k, c.B, c.H_kv, c.T, c.D);
  add_rows("v", c.v, c.B, c.H_kv, c.T, c.D_v);
  const int64_t prefixes = c.packed ? 1 : c.N;
  add_rows("prefix_k", c.prefix_k, prefixes, c.H_kv, c.P, c.D);
  add_rows("prefix_v", c.prefix_v, prefixes, c.H_kv, c.P, c.D_v);
  add_rows("o", c.o, c.B, c.H, c.S, c.D_v, outputs);
  const int64_t rows = int64_t{c.B} * c.H * c.S;
  emulator::global_memory.add("lse", c.lse, rows * 4, outputs);
  if (c.prefix_bias) emulator::global_memory.add("prefix_bias", c.prefix_bias, prefixes * c.H_kv * c.P * 4, false);
  if (c.sinks) emulator::global_memory.add("sinks", c.sinks, c.H * 4, false);
  add_integers("prefix_ids", c.prefix_ids, c.B, c.ids_by_row ? c.S : 1);
  add_integers("prefix_lens", c.prefix_lens, c.N, 1);
  add_integers("q_start", c.q_start, c.B, 1);
  add_integers("segment_ids", c.segments, c.B, c.T);
  if (c.padding && c.T > 0)
    emulator::global_memory.add("key_padding_mask", c.padding, (c.B - 1) * c.padding_batch + (c.T - 1) * c.padding_key + 1, false);
}

inline void add_workspace(void* workspace, int64_t bytes) {
  if (bytes) emulator::global_memory.add("workspace", workspace, bytes, true);
}

inline void add_buffers(const AttentionCall& c, void* workspace, int64_t bytes) {
  add_inputs(c, true);
  add_workspace(workspace, bytes);
}

inline void add_buffers(const BackwardCall& call, void* workspace, int64_t bytes) {
  const AttentionCall& c = call.forward;
  add_inputs(c, false);
  add_rows("do", call.dout, c.B, c.H, c.S, c.D_v);
  if (call.dq.data) add_rows("dq", call.dq, c.B, c.H, c.S, c.D, true);
  if (call.dk.data) add_rows("dk", call.dk, c.B, c.H_kv, c.T, c.D, true);
  if (call.dv.data) add_rows("dv", call.dv, c.B, c.H_kv, c.T, c.D_v, true);
  const int64_t tokens = int64_t{c.packed ? 1 : c.N} * c.H_kv * c.P;
  if (call.dprefix_k) emulator::global_memory.add("dprefix_k", call.dprefix_k, tokens * c.D * 4, true);
  if (call.dprefix_v) emulator::global_memory.add("dprefix_v", call.dprefix_v, tokens * c.D_v * 4, true);
  if (call.dprefix_bias) emulator::global_memory.add("dprefix_bias", call.dprefix_bias, tokens * 4, true);
  add_workspace(workspace, bytes);
}

}  // namespace fastprefix
