// Elementary functions that a loop marked `omp simd` can call for a whole vector at once.
// glibc ships them in libmvec but declares them only under -ffast-math, which flatcore does not use (it must
// keep infinities, NaN and signed zeros). The declarations below add nothing but the vector variants; the
// build defines FLATCORE_LIBMVEC after it has linked one. Their documented error is at most 4 ulp.
#pragma once

#include <cmath>

#if defined(FLATCORE_LIBMVEC) && !defined(__CUDACC__)
extern "C" {
#define FLATCORE_VECTOR __attribute__((simd("notinbranch")))
FLATCORE_VECTOR float expf(float) noexcept;
FLATCORE_VECTOR double exp(double) noexcept;
FLATCORE_VECTOR float expm1f(float) noexcept;
FLATCORE_VECTOR double expm1(double) noexcept;
FLATCORE_VECTOR float log1pf(float) noexcept;
FLATCORE_VECTOR double log1p(double) noexcept;
FLATCORE_VECTOR float logf(float) noexcept;
FLATCORE_VECTOR double log(double) noexcept;
FLATCORE_VECTOR float tanhf(float) noexcept;
FLATCORE_VECTOR double tanh(double) noexcept;
FLATCORE_VECTOR float erff(float) noexcept;
FLATCORE_VECTOR double erf(double) noexcept;
FLATCORE_VECTOR float sinf(float) noexcept;
FLATCORE_VECTOR double sin(double) noexcept;
FLATCORE_VECTOR float cosf(float) noexcept;
FLATCORE_VECTOR double cos(double) noexcept;
#undef FLATCORE_VECTOR
}
#endif
