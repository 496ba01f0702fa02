// The devices that this build serves. An op of the front is a function template over `Device`, registered for each
// device that has a launcher for it.
#pragma once

#include <torch/csrc/stable/library.h>

#include "cpu.h"
#ifdef USE_CUDA
#include "cuda.h"
#endif
