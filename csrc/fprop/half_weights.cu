// Packs the weights of fprop_half.cu on the host, once for all calls.
#include "fprop/half_weights.h"

#include <string.h>

namespace adder2d::fprop_half {
namespace {

// Element `index` of host memory, as the nearest half.
uint16_t half_bits(void const* w, int64_t index, int32_t type) {
  uint16_t bits = 0;
  if (type == ADDER2D_FLOAT16) {
    memcpy(&bits, static_cast<char const*>(w) + 2 * index, sizeof(bits));
    return bits;
  }
  float value = 0;
  if (type == ADDER2D_FLOAT32) {
    memcpy(&value, static_cast<char const*>(w) + 4 * index, sizeof(value));
  } else {  // ADDER2D_BFLOAT16: the upper half of a float
    memcpy(&bits, static_cast<char const*>(w) + 2 * index, sizeof(bits));
    uint32_t const wide = uint32_t{bits} << 16;
    memcpy(&value, &wide, sizeof(value));
  }
  __half const half = __float2half_rn(value);
  memcpy(&bits, &half, sizeof(bits));
  return bits;
}

}  // namespace
}  // namespace adder2d::fprop_half

using namespace adder2d::fprop_half;

size_t adder2d_packed_weight_bytes(Adder2dParams const* params) {
  return adder2d_check(params) == nullptr && has_half_shape(*params) ? weight_bytes(*params) : 0;
}

int32_t adder2d_pack_weights_cpu(Adder2dParams const* params, void* packed) {
  if (adder2d_packed_weight_bytes(params) == 0 || params->w == nullptr || packed == nullptr) return 1;
  Adder2dParams const& p = *params;
  int64_t const channels = p.C / p.groups, filters = p.K / p.groups, taps = int64_t{p.R} * p.S;
  int64_t const slices = slices_of(p), pitch = pitch_of(p), vectors = vectors_of(p);
  memset(packed, 0, weight_bytes(p));
  auto* const to = static_cast<uint16_t*>(packed);
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t k = 0; k < filters; ++k)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t tap = 0; tap < taps; ++tap) {
          int64_t const term = (tap * vectors + c / kVector) * kVector + c % kVector;  // of the reduction
          int64_t const place = ((group * slices + term / kTileC) * pitch + k) * kTileC + term % kTileC;
          to[place] = half_bits(p.w, ((group * filters + k) * channels + c) * taps + tap, p.w_type);
        }
  return 0;
}
