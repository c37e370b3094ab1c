// Tools of the emulated kernels' tests: CHECK, and 16-bit numbers as the kernels see them.
#pragma once

#include "../../tests/check.h"
#include "../emulation.h"
