# HAS_LIBMVEC: glibc's vector mathematics, with every function that csrc/kernels/vector_math.h declares (glibc 2.35).
include(CheckCXXSourceCompiles)
set(CMAKE_REQUIRED_LIBRARIES mvec)
check_cxx_source_compiles(
    "extern \"C\" { void _ZGVbN4v_tanhf(); void _ZGVdN8v_erff(); void _ZGVeN16v_erff(); void _ZGVeN8v_expm1(); }
     int main(int n, char**) {
         void (*list[])() = {_ZGVbN4v_tanhf, _ZGVdN8v_erff, _ZGVeN16v_erff, _ZGVeN8v_expm1};
         list[n]();
     }"
    HAS_LIBMVEC
)
unset(CMAKE_REQUIRED_LIBRARIES)
