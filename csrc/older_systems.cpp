// GCC would take these symbols from glibc 2.32 and from the libstdc++ of GCC 9. They are defined here, so that the
// library loads wherever torch does: from glibc 2.28 on.
#include <new>
#include <sstream>

template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();

// libstdc++ reads this before it counts a reference; 0: there may be threads
extern "C" {
extern char __libc_single_threaded __attribute__((visibility("hidden")));
char __libc_single_threaded = 0;

// std::__throw_bad_array_new_length() of GCC 11, which every std::vector calls where its size overflows
[[noreturn]] void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv")
    __attribute__((visibility("hidden")));
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}
