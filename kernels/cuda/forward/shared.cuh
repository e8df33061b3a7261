// Shared memory of the forward for sm_90a: query rows, stages of keys and values, barriers, and the list of prefixes.
#pragma once

#include "forward/params.cuh"
#include "tiles.cuh"

namespace fastprefix {

template <int D, int BLOCK_M, int BLOCK_N, int STAGES>
struct ForwardShared {
  static constexpr int PANELS = D / 64, MOST_PREFIXES = BLOCK_M, MOST_WARPS = 16;
  static constexpr uint32_t ROWS = BLOCK_M * D * 2, TILE = BLOCK_N * D * 2;
  static constexpr uint32_t KEYS = ROWS, VALUES = KEYS + STAGES * TILE, BARRIERS = VALUES + STAGES * TILE;
  static constexpr uint32_t LIST = BARRIERS + 4 * STAGES * 8, SEGMENTS = LIST + (4 + 2 * MOST_PREFIXES) * 4;
  static constexpr uint32_t BYTES = SEGMENTS + 2 * 8 * MOST_WARPS;

  FP_DEVICE uint32_t rows() { return shared_base(); }
  FP_DEVICE uint32_t k_tile(int stage) { return shared_base() + KEYS + stage * TILE; }
  FP_DEVICE uint32_t v_tile(int stage) { return shared_base() + VALUES + stage * TILE; }
  // A tile is full when its copy has arrived, and empty when all warps of the consumers have read it.
  FP_DEVICE uint32_t full_k(int stage) { return shared_base() + BARRIERS + 8 * stage; }
  FP_DEVICE uint32_t full_v(int stage) { return full_k(STAGES + stage); }
  FP_DEVICE uint32_t empty_k(int stage) { return full_k(2 * STAGES + stage); }
  FP_DEVICE uint32_t empty_v(int stage) { return full_k(3 * STAGES + stage); }
  // Prefixes that rows of the tile read: how many, their tiles in all, whether all rows read all of them; then the number
  // and the length of each.
  FP_DEVICE uint32_t list(int word) { return shared_base() + LIST + 4 * word; }
  FP_DEVICE uint32_t segment_room() { return shared_base() + SEGMENTS; }
};

}  // namespace fastprefix
