// float16 and bfloat16 input on float32 arithmetic, after a conversion of the input: fprop_converted.cu.
#pragma once

#include "fprop/fprop.h"

namespace adder2d {

extern FpropFamily const kFpropConverted;

// How many of `images` images to launch at a time, so that their float32 copies find room in the largest workspace.
int32_t images_of_fprop_converted(Adder2dParams const& p, int32_t images);

// api/fprop.cu: the problem as kernels read it.
FpropArgs make_fprop_args(Adder2dParams const& p);

}  // namespace adder2d
