// A fault planted in whatever is compiled after this: right-hand fragments are loaded untransposed.
#pragma once

#include "../../launch.h"
#include "../../primitives.h"

#define ldmatrix_x2_trans ldmatrix_x2
#define ldmatrix_x4_trans ldmatrix_x4
