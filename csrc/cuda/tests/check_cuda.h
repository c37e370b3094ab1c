// Tools for tests of emulated kernels: CHECK, and the 16-bit types of the kernels.
#pragma once

#include "../../tests/check.h"
#include "../emulation.h"
