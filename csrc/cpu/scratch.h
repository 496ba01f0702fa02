// Memory for intermediate results, kept by each thread for its next call: fresh pages cost more than the work on them.
#pragma once

#include <cstdint>

namespace fusedres::cpu {

// What a thread keeps at one time: what all threads of a call share, and what each of them has for itself. The thread
// that calls an op is also one of those that work on it.
enum class Scratch { kShared, kOwn };

// At least `floats` floats, uninitialised, at the beginning of a huge page, where the system has them. They are valid
// until this thread's next call for the same use. Throws std::bad_alloc.
float* scratch(Scratch use, int64_t floats);

}  // namespace fusedres::cpu
