// The devices that this build's front serves. A family of ops is a set of function templates over `Device`, which are
// registered for each device.
#pragma once

#include <torch/csrc/stable/library.h>

#include "cpu.h"
#ifdef USE_CUDA
#include "cuda.h"
#endif
