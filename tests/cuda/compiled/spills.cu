// A kernel that cannot be compiled without memory of its own: more values at once than its threads have registers.
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* p) {
  float x[64];
#pragma unroll
  for (int i = 0; i < 64; i++) x[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) p[i * 1024 + threadIdx.x] = x[i] * x[63 - i] + x[(i * 7) % 64];
}
