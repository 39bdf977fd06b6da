// The two plugin generations as exports.cpp sees them: one creator each, which lives as long as the library.
#pragma once

#include "abi.h"

namespace adder2d {

nvinfer1::IPluginCreator& plugin_v2_creator();
nvinfer1::v_1_0::IPluginCreatorV3One& plugin_v3_creator();

}  // namespace adder2d
