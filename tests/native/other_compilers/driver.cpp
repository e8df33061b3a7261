// One call of the kernels for processors, without torch and Python: read from a file, its results written to another.
//
// The file has the numbers below, then q, k, v, prefix_k, prefix_v, prefix_bias and the output's gradient, as fp32 in
// contiguous [B, S, H, D], [B, T, K, D], [B, T, K, E], [K, P, D], [K, P, E], [K, P] and [B, S, H, E].
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/kernels.h"

namespace fastprefix {

void run_tasks(int64_t count, bool, Task task, const void* context) {
  for (int64_t i = count - 1; i >= 0; i--) task(context, i);  // tasks depend on no order
}

}  // namespace fastprefix

namespace {

using namespace fastprefix;

struct Numbers {
  int64_t B, H, K, S, T, P, D, E, causal, window, bf16;
  double scale, softcap;
};

std::vector<float> read(FILE* file, int64_t size) {
  std::vector<float> x(size);
  if (std::fread(x.data(), sizeof(float), size, file) != static_cast<size_t>(size)) std::abort();
  return x;
}

void write(FILE* file, const std::vector<float>& x) { std::fwrite(x.data(), sizeof(float), x.size(), file); }

// The upper half of a float's bits: the numbers of the file are those of bf16 already.
std::vector<uint16_t> halves(const std::vector<float>& x) {
  std::vector<uint16_t> found(x.size());
  for (size_t i = 0; i < x.size(); i++) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x[i], 4);
    found[i] = bits >> 16;
  }
  return found;
}

std::vector<float> floats(const std::vector<uint16_t>& x) {
  std::vector<float> found(x.size());
  for (size_t i = 0; i < x.size(); i++) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    __builtin_memcpy(&found[i], &bits, 4);
  }
  return found;
}

Heads heads(void* data, int64_t rows, int64_t number, int64_t width, Type type) {
  Heads x;
  x.data = static_cast<char*>(data);
  x.batch = rows * number * width;
  x.head = width;
  x.row = number * width;
  x.type = type;
  return x;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  FILE *in = std::fopen(argv[1], "rb"), *out = std::fopen(argv[2], "wb");
  Numbers n;
  if (!in || !out || std::fread(&n, sizeof n, 1, in) != 1) return 2;
  std::vector<float> q = read(in, n.B * n.S * n.H * n.D), k = read(in, n.B * n.T * n.K * n.D);
  std::vector<float> v = read(in, n.B * n.T * n.K * n.E), prefix_k = read(in, n.K * n.P * n.D);
  std::vector<float> prefix_v = read(in, n.K * n.P * n.E), bias = read(in, n.K * n.P);
  std::vector<float> dout = read(in, n.B * n.S * n.H * n.E);
  std::vector<uint16_t> half_q = halves(q), half_k = halves(k), half_v = halves(v), half_dout = halves(dout);
  std::vector<float> o(dout.size()), lse(n.B * n.H * n.S);
  std::vector<uint16_t> half_o(o.size());
  const Type type = n.bf16 ? Type::BF16 : Type::F32;
  const auto of = [&](std::vector<float>& whole, std::vector<uint16_t>& half) {
    return n.bf16 ? static_cast<void*>(half.data()) : whole.data();
  };
  const int64_t first = 0;
  Call c{};
  c.B = n.B, c.H = n.H, c.K = n.K, c.S = n.S, c.T = n.T, c.D = n.D, c.E = n.E;
  c.q = heads(of(q, half_q), n.S, n.H, n.D, type);
  c.k = heads(of(k, half_k), n.T, n.K, n.D, type);
  c.v = heads(of(v, half_v), n.T, n.K, n.E, type);
  c.o = heads(of(o, half_o), n.S, n.H, n.E, type);
  c.lse = lse.data();
  c.prefix.k = heads(prefix_k.data(), n.P, 1, n.D, Type::F32);
  c.prefix.v = heads(prefix_v.data(), n.P, 1, n.E, Type::F32);
  c.prefix.k.head = n.P * n.D;
  c.prefix.v.head = n.P * n.E;
  c.prefix.tokens = n.P;
  c.prefix.first = &first;
  c.prefix.length = &n.P;
  c.prefix.bias = bias.data();
  c.scale = static_cast<float>(n.scale);
  c.softcap = static_cast<float>(n.softcap);
  c.causal = n.causal;
  c.window = n.window;
  forward(c);
  std::vector<float> dq(q.size()), dk(k.size()), dv(v.size()), dprefix_k(prefix_k.size()), dprefix_v(prefix_v.size());
  std::vector<float> dbias(bias.size());
  Gradients g;
  g.dout = heads(of(dout, half_dout), n.S, n.H, n.E, type);
  g.q = heads(dq.data(), n.S, n.H, n.D, Type::F32);
  g.k = heads(dk.data(), n.T, n.K, n.D, Type::F32);
  g.v = heads(dv.data(), n.T, n.K, n.E, Type::F32);
  g.prefix_k = dprefix_k.data();
  g.prefix_v = dprefix_v.data();
  g.prefix_bias = dbias.data();
  backward(c, g);
  write(out, n.bf16 ? floats(half_o) : o);
  for (const auto& x : {lse, dq, dk, dv, dprefix_k, dprefix_v, dbias}) write(out, x);
  std::puts(instruction_set());
  return std::fclose(out);
}
