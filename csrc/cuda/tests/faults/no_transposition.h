// A fault for all code after this header: right-hand fragments are loaded untransposed.
#pragma once

#include "../../launch.h"
#include "../../primitives.h"

#define ldmatrix_x2_trans ldmatrix_x2
#define ldmatrix_x4_trans ldmatrix_x4
