// The kernels in plain C++ with vectors of 128 bits, which every processor of the last twenty years has.
#include "kernels.h"

#define FASTPREFIX_ISA baseline
#define FASTPREFIX_LANES 4
#include "table.h"
