// A token of scale j attends to every token of the scales up to and including j.
#pragma once

#include "../include/block_causal_attention.h"

namespace variant::cuda {

// Scales that fit a kernel's arguments.
constexpr int64_t kMostScales = 64;

}  // namespace variant::cuda
