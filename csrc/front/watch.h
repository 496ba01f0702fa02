// What fusedres/patching/watch.py describes, read.
#pragma once

#include "python.h"

namespace fusedres::front {

// A new list of a block's modules and tensors, as the watch asks for them; None where anything is not as it was, and
// null where an interrupt was raised.
python::Object* read(python::Object* watch, python::Object* block);

}  // namespace fusedres::front
