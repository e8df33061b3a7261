// The C interface of decoding, and all instances of its kernels.
#include "decode/launches.cuh"

namespace {

using namespace fastprefix;

template <class T>
const char* launch_width(const DecodeParams& params, void* stream) {
  switch (tile_width(params.call)) {
    case 64: return launch_decode<T, 64>(params, stream);
    case 128: return launch_decode<T, 128>(params, stream);
    default: return launch_decode<T, 256>(params, stream);
  }
}

}  // namespace

extern "C" int fastprefix_decode_route(const AttentionCall* call) {
  const char* reason = nullptr;
  const int count = use_device(call->device, &reason);
  return route_of(*call, count ? count : 132);   // without a device: an H100's
}

extern "C" int64_t fastprefix_decode_workspace(const AttentionCall* call) {
  const char* reason = refusal(*call);
  const int count = reason ? 0 : use_device(call->device, &reason);
  return count ? workspace_of(*call, plan_of(*call, count)).bytes : 0;
}

extern "C" const char* fastprefix_decode(const AttentionCall* call, void* workspace, void* stream) {
  DecodeParams params{};
  const char* reason = prepare_decode(*call, workspace, params);
  if (reason) return reason;
  return call->dtype == BF16 ? launch_width<bf16_t>(params, stream) : launch_width<fp16_t>(params, stream);
}
