// Integer division: by a run-time constant without a division, and rounded up.
#pragma once

#include <stdint.h>

namespace adder2d {

// n / d for 0 <= n < 2^31 and 1 <= d < 2^31 by one multiplication (Granlund and Montgomery, 1994).
struct FastDiv {
  uint32_t divisor, multiplier, shift;

  FastDiv() = default;
  explicit FastDiv(int64_t d) : divisor(static_cast<uint32_t>(d)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  __device__ __forceinline__ int32_t div(int32_t n) const {
    return static_cast<int32_t>((__umulhi(static_cast<uint32_t>(n), multiplier) + static_cast<uint32_t>(n)) >> shift);
  }
  __device__ __forceinline__ int32_t divmod(int32_t n, int32_t* remainder) const {
    int32_t const quotient = div(n);
    *remainder = n - quotient * static_cast<int32_t>(divisor);
    return quotient;
  }
};

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace adder2d
