// The forward problem as kernels read it.
#pragma once

#include <stdint.h>

#include "adder2d.h"
#include "common/fast_div.h"

namespace adder2d {

// The problem as kernels read it, passed by value.
struct FpropArgs {
  Adder2dParams p;
  int32_t Cg, Kg;  // channels and filters of one group
  int32_t CRS;     // reduction length: Cg * R * S
  int32_t NPQ;     // output pixels of the whole batch
  FastDiv div_PQ, div_Q, div_RS, div_S;
  // Elements of x from a tap to the next one along s; then from the end of a row of taps to the next r; then from the
  // end of all taps to the next channel.
  int64_t step_s, step_r, step_c;
  // Filters lie side by side in y (channels_last); else pixels do. Four of them from a multiple of 4 on may be stored
  // at once.
  bool y_channels_last, y_vectors;
  bool y_linear;             // pixel m of the batch lies at m * y_stride[3]
  Adder2dEpilogue epilogue;  // one that changes nothing where there is none
  bool fused;                // there is one
  bool residual_as_y;  // there is none, or it has y's strides, and four of it an aligned address where y's may have one
  bool stores_plain;   // y_vectors, and not `fused`
  bool stores_vectors;  // y_vectors, `fused`, and residual_as_y
};

}  // namespace adder2d
