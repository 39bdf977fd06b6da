// float16 and bfloat16 input on float32 arithmetic, after a conversion of the input: fprop_converted.cu.
#pragma once

#include "fprop/fprop.h"

namespace adder2d {

extern FpropFamily const kFpropConverted;

// Whether a batch is cut for this family's sake: layers of few channels, which it is for.
bool is_for_conversion(Adder2dParams const& p);

// How many of `images` images to launch at a time there, so that their float32 copies find room in p's workspace.
int32_t images_of_fprop_converted(Adder2dParams const& p, int32_t images);

// api/fprop.cu: the problem as kernels read it.
FpropArgs make_fprop_args(Adder2dParams const& p);

}  // namespace adder2d
