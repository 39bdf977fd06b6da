// The inner loop on float32 arithmetic: |x - w| of a slice in shared memory, added to a thread's outputs.
#pragma once

#include <stdint.h>

namespace adder2d {

// Adds a slice's `terms`, a multiple of kUnroll, to acc[filter][pixel]. `w` and `x` are the thread's first filter and
// pixel in the slice's rows. fill() runs as soon as the first term is on its way.
template <class T, class Fill>
__device__ __forceinline__ void add_terms(float const* w, float const* x, int32_t terms, Fill const& fill,
                                          float (&acc)[T::kThreadK][T::kThreadPQ]) {
  float w_frag[2][T::kThreadK], x_frag[2][T::kThreadPQ];
  auto const load = [&](int32_t term, int buffer) {
#pragma unroll
    for (int i = 0; i < T::kGroupsK; ++i)
      *reinterpret_cast<float4*>(&w_frag[buffer][4 * i]) =
          *reinterpret_cast<float4 const*>(w + term * T::kPitchK + i * (T::kTileK / T::kGroupsK));
#pragma unroll
    for (int i = 0; i < T::kGroupsPQ; ++i)
      *reinterpret_cast<float4*>(&x_frag[buffer][4 * i]) =
          *reinterpret_cast<float4 const*>(x + term * T::kPitchPQ + i * (T::kTilePQ / T::kGroupsPQ));
  };
  load(0, 0);
  fill();
#pragma unroll 1
  for (int c = 0; c < terms; c += T::kUnroll) {
#pragma unroll
    for (int u = 0; u < T::kUnroll; ++u) {
      // The fragments of the next term are on their way while this one is added. The slice's last term is read twice:
      // what follows it is being filled.
      load(u + 1 < T::kUnroll || c + T::kUnroll < terms ? u + 1 : u, (u + 1) % 2);
#pragma unroll
      for (int i = 0; i < T::kThreadK; ++i)
#pragma unroll
        for (int j = 0; j < T::kThreadPQ; ++j) acc[i][j] += fabsf(x_frag[u % 2][j] - w_frag[u % 2][i]);
    }
    w += T::kUnroll * T::kPitchK;
    x += T::kUnroll * T::kPitchPQ;
  }
}

}  // namespace adder2d
