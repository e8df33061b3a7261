// The stream that torch is to launch on, found without linking torch's CUDA libraries.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace fastprefix {

using GetStream = AOTITorchError (*)(int32_t device, void** stream);

// libtorch_cuda.so brings this function, and a torch without CUDA has no such file. Python loads torch's libraries for
// itself alone, so the linker would not find the name for us: the file that is loaded already is asked by its own name.
inline GetStream find_get_stream() {
  constexpr const char* NAME = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, NAME);
  if (!found)
    if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, NAME);
  return reinterpret_cast<GetStream>(found);
}

inline void* current_stream(int32_t device) {
  static const GetStream get_stream = find_get_stream();
  if (!get_stream) throw std::runtime_error("torch: got one without CUDA, expected one that has streams of CUDA");
  void* stream = nullptr;
  if (get_stream(device, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("torch: its current CUDA stream cannot be had");
  return stream;
}

}  // namespace fastprefix
