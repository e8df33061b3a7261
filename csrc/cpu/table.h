// All kernels of one instruction set, as the table by which they are called.
#pragma once

#include "vector.h"
#include "convert.h"
#include "gemm.h"
#include "scores.h"
#include "stairs.h"
#include "attend_few.h"
#include "attend_block.h"
#include "backward.h"

#define FASTPREFIX_NAME_OF(isa) #isa
#define FASTPREFIX_NAME(isa) FASTPREFIX_NAME_OF(isa)

namespace fastprefix::FASTPREFIX_ISA {
const Kernels kernels{FASTPREFIX_NAME(FASTPREFIX_ISA), attend, combine, backward};
}
