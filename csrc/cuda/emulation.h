// CUDA source compiled as C++: include this (launch.h and primitives.h do) where nvcc would be.
// EMULATION.md lists what is emulated, what is stricter than a GPU, and what is missing.
#pragma once

#include "emulation/async_copy.h"
#include "emulation/atomics.h"
#include "emulation/half.h"
#include "emulation/intrinsics.h"
#include "emulation/language.h"
#include "emulation/matrix.h"
#include "emulation/scheduler.h"
#include "emulation/warp.h"
