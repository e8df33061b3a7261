// The functions of kernels/cuda/wrappers.cuh as a processor runs them. That file includes this one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.hpp"
#include "global_memory.hpp"

namespace fastprefix {

namespace emulator {

template <class To, class From>
To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// A half's exponent and mantissa in a float's place are the number times 2^-112. Infinity and NaN become 2^16 and more.
template <class T>
float widen(uint16_t x) {
  if constexpr (std::is_same_v<T, bf16_t>) return bits_of<float>(static_cast<uint32_t>(x) << 16);
  const float magnitude = bits_of<float>((x & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.f ? 0x7f800000u : 0u;
  return bits_of<float>(bits_of<uint32_t>(magnitude) | special | (x & 0x8000u) << 16);
}

// To nearest, ties to even.
template <class T>
uint16_t narrow(float x) {
  if (std::isnan(x)) return 0x7fff;
  if constexpr (std::is_same_v<T, bf16_t>) {
    const uint32_t u = bits_of<uint32_t>(x);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  } else {
    return bits_of<uint16_t>(static_cast<_Float16>(x));
  }
}

inline float flush_denormal(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

// Each lane gives a value and gets that of the lane which `source` computes from its own number.
template <class V, class Source>
V shuffle(const char* name, V x, Source source) {
  struct Lane {
    V given, taken;
    int from;
  } mine{x, x, 0};
  mine.from = source(block->lane());
  block->collective(name, &mine, [](void** lanes) {
    for (int i = 0; i < 32; i++) {
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      lane.taken = static_cast<Lane*>(lanes[lane.from])->given;
    }
  });
  return mine.taken;
}

// Row i % 8 of matrix i / 8 is where lane i says. Lane l gets two elements of each matrix: of row l / 4, columns
// l % 4 * 2 and the next one; transposed, of column l / 4 and the rows of those numbers.
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, bool trans, const char* name) {
  struct Lane {
    uint32_t address;
    uint32_t* registers;
  } mine{address, r};
  block->collective(name, &mine, [trans, name](void** arguments) {
    Lane* lanes[32];
    for (int i = 0; i < 32; i++) lanes[i] = static_cast<Lane*>(arguments[i]);
    block->counters.ldmatrix++;
    for (int matrix = 0; matrix < 4; matrix++) {
      uint16_t x[8][8];
      int rows_in_bank[8] = {}, most = 0;
      for (int row = 0; row < 8; row++) {
        const uint32_t from = lanes[matrix * 8 + row]->address;
        block->load(from, 16, x[row], name, true);
        most = std::max(most, ++rows_in_bank[from / 16 % 8]);
      }
      block->counters.bank_conflicts += most - 1;
      for (int lane = 0; lane < 32; lane++) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint16_t low = trans ? x[j][i] : x[i][j], high = trans ? x[j + 1][i] : x[i][j + 1];
        lanes[lane]->registers[matrix] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

}  // namespace emulator

inline int thread_index() { return emulator::position.thread; }
inline int thread_index_again() { return thread_index(); }
inline int block_index() { return static_cast<int>(emulator::position.block); }
inline uint32_t shared_base() { return emulator::Block::SHARED_BASE; }

inline void sync_block() { emulator::block->sync_block(); }
inline void sync_warp() { emulator::block->sync_warp(); }

inline float shfl_xor(float x, int mask) {
  return emulator::shuffle("shfl_xor", x, [mask](int lane) { return lane ^ (mask & 31); });
}
template <class V>
V shfl_idx(V x, int lane) {
  return emulator::shuffle("shfl_idx", x, [lane](int) { return lane & 31; });
}
inline int shfl_up(int x, int delta) {
  delta &= 31;
  return emulator::shuffle("shfl_up", x, [delta](int lane) { return lane >= delta ? lane - delta : lane; });
}
inline bool vote_all(bool x) {
  int all = x;
  for (int mask = 16; mask > 0; mask /= 2)
    all &= emulator::shuffle("vote_all", all, [mask](int lane) { return lane ^ mask; });
  return all != 0;
}

inline float ex2_approx(float x) { return emulator::flush_denormal(std::exp2(emulator::flush_denormal(x))); }
inline float rcp_approx(float x) { return emulator::flush_denormal(1.0f / emulator::flush_denormal(x)); }
inline float lg2_approx(float x) { return std::log2(emulator::flush_denormal(x)); }

template <class T>
uint32_t pack(float low, float high) {
  return emulator::narrow<T>(low) | static_cast<uint32_t>(emulator::narrow<T>(high)) << 16;
}

inline float bits_to_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float half_to_float(uint16_t x) {
  _Float16 y;
  std::memcpy(&y, &x, sizeof y);
  return static_cast<float>(y);
}

template <class V>
V ld_global(const V* p) {
  V x;
  std::memset(&x, 0xFF, sizeof x);
  if (emulator::global_memory.read(p, sizeof x, sizeof x, "ld_global")) x = *p;
  return x;
}
template <class V>
void st_global(V* p, V x) {
  if (emulator::global_memory.write(p, sizeof x, sizeof x, "st_global")) *p = x;
}

namespace emulator {

template <class V>
V ld_shared(uint32_t address) {
  V x;
  block->load(address, sizeof x, &x, "ld_shared");
  return x;
}

// Until the copy lands its place holds NaN, unless it came at once. Nobody may look before the wait in either case.
inline void cp_async_16(uint32_t to, const void* from, int bytes) {
  uint8_t* place = block->shared_at(to, 16, 16, "cp_async");
  if (!place) return;
  block->counters.cp_async++;
  block->trace_write(to, 16, block->actor(), "cp_async", true);
  const auto copy = [=] {
    std::memset(place, 0, 16);
    if (bytes) std::memcpy(place, from, 16);
  };
  std::memset(place, 0xFF, 16);
  const Mode mode = session.options.mode;
  if (mode == EAGER || (mode == RANDOM && block->scheduler.random() % 2)) copy();
  block->cp_async[position.thread].open.push_back([=] {
    copy();
    block->trace_landing(to, 16, block->actor());
  });
}

}  // namespace emulator

inline float ld_shared(uint32_t a) { return emulator::ld_shared<float>(a); }
inline Float4 ld_shared4(uint32_t a) { return emulator::ld_shared<Float4>(a); }
inline Bits4 ld_shared_bits4(uint32_t a) { return emulator::ld_shared<Bits4>(a); }
inline int ld_shared_int(uint32_t a) { return emulator::ld_shared<int>(a); }
template <class V>
void st_shared(uint32_t a, V x) {
  emulator::block->store(a, sizeof x, &x, "st_shared");
}

inline void cp_async_16(uint32_t to, const void* from, int bytes) {
  if (bytes != 0 && bytes != 16) emulator::report("cp_async of %d bytes", bytes);
  if (bytes != 16 || !emulator::global_memory.read(from, 16, 16, "cp_async")) bytes = 0;
  emulator::cp_async_16(to, from, bytes);
}
inline void cp_async_commit_group() { emulator::block->cp_async[emulator::position.thread].commit(); }
template <int N>
void cp_async_wait_group() {
  emulator::block->cp_async[emulator::position.thread].wait(N);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) { emulator::ldmatrix_x4(r, a, false, "ldmatrix_x4"); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) { emulator::ldmatrix_x4(r, a, true, "ldmatrix_x4_trans"); }

namespace emulator {

// Lane l holds, with g = l / 4 and t = l % 4 * 2: of a the elements (g + 8 (i % 2), t + 8 (i / 2)) and their right
// neighbours in register i; of b (t + 8 i, g) and its lower neighbour; of c (g + 8 (i / 2), t + i % 2).
template <class T>
void unpack_a(const uint32_t* registers, int lane, float (*a)[16]) {
  for (int i = 0; i < 8; i++) {
    const uint16_t x = static_cast<uint16_t>(registers[i / 2] >> i % 2 * 16);
    a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i / 4 * 8 + i % 2] = widen<T>(x);
  }
}

// What a lane gives to an mma.
struct Mma {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
void mma_m16n8k16(void** lanes) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Mma& mine = *static_cast<Mma*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    unpack_a<T>(mine.a, lane, a);
    for (int i = 0; i < 4; i++) {
      b[t + i / 2 * 8 + i % 2][g] = widen<T>(static_cast<uint16_t>(mine.b[i / 2] >> i % 2 * 16));
      c[g + i / 2 * 8][t + i % 2] = mine.c[i];
    }
  }
  for (int m = 0; m < 16; m++) {
    for (int k = 0; k < 16; k++) {
      for (int n = 0; n < 8; n++) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    float* mine = static_cast<Mma*>(lanes[lane])->c;
    for (int i = 0; i < 4; i++) mine[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace emulator

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Mma mine{c, a, {b0, b1}};
  emulator::block->collective("mma_m16n8k16", &mine, [](void** lanes) {
    emulator::block->counters.mma++;
    emulator::mma_m16n8k16<T>(lanes);
  });
}

}  // namespace fastprefix
