// A fault for all code after this header: __syncthreads does nothing.
#pragma once

#include "../../launch.h"
#include "../../primitives.h"

#define __syncthreads() static_cast<void>(0)
