// Calls that need nothing but the kernels: neither Python's checks nor torch's dispatcher would do anything for them.
#pragma once

#include "ops/inputs.h"

namespace fastprefix {

// Whether a call passes the checks of validation.py and fits the kernels' dtypes and head dims. False says only that
// Python has to look.
bool fits(const Inputs& inputs);

// Whether a call that fits is one for a processor that gets no gradient, and no mode, transform, autocast or tracer would
// see it.
bool is_direct(const Inputs& inputs);

// For which calls `auto` has decided for these kernels, by what decides it (`signature` in verification/cells.py).
void remember(const Inputs& inputs);
void forget();
bool is_remembered(const Inputs& inputs);

}  // namespace fastprefix
