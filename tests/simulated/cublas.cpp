// cuBLAS and cuBLASLt, as far as torch multiplies with them: operands must lie on the current device and
// within their memory. What is not here does nothing (stubs.py). No function computes.
#include "runtime.h"

#include <cublasLt.h>
#include <cublas_v2.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>

namespace simulated {
namespace {

struct Handle {
    int device;
    cudaStream_t stream = nullptr;
    cublasMath_t math = CUBLAS_DEFAULT_MATH;
    cublasPointerMode_t pointers = CUBLAS_POINTER_MODE_HOST;
};

struct Layout {
    cudaDataType type;
    int64_t rows, columns, leading, stride = 0, batch = 1;
};

struct Description {
    int32_t a_transposed = 0, b_transposed = 0;
};

// By columns, as cuBLAS has them.
struct Operand {
    const char* name;
    const void* data;
    cudaDataType type;
    int64_t rows, columns, leading, stride;
};

Handle& of(cublasHandle_t handle) {
    Handle& found = *reinterpret_cast<Handle*>(handle);
    if (found.device != device) complain("cuBLAS handle of another device");
    return found;
}
Layout& of(cublasLtMatrixLayout_t layout) { return *reinterpret_cast<Layout*>(layout); }
Description& of(cublasLtMatmulDesc_t description) { return *reinterpret_cast<Description*>(description); }

int64_t bytes_of(cudaDataType type) {
    switch (type) {
    case CUDA_R_64F:
        return 8;
    case CUDA_R_32F:
        return 4;
    case CUDA_R_16F:
    case CUDA_R_16BF:
        return 2;
    default:
        complain("matrix product of a type that the simulation does not know");
        return 0;
    }
}

void check(const Operand& x, int64_t batch) {
    if (x.rows <= 0 || x.columns <= 0 || batch <= 0) return;
    const std::string name = std::string("operand ") + x.name + " of a matrix product ";
    size_t room = 0;
    const Memory* memory = find(x.data, &room);
    if (!memory || memory->on_host) return complain(name + "lies on no device");
    if (memory->device != device) return complain(name + "lies on another device");
    const int64_t last = (x.columns - 1) * x.leading + x.rows + (batch - 1) * x.stride;
    const int64_t excess = last * bytes_of(x.type) - static_cast<int64_t>(room);
    if (excess <= 0) return;
    char text[200];
    std::snprintf(
        text, sizeof text,
        "(%ld x %ld, leading dimension %ld, stride %ld, %ld of them) leaves its memory by %ld bytes", x.rows,
        x.columns, x.leading, x.stride, batch, excess);
    complain(name + text);
}

// C (m x n) = op(A) op(B), of which the inner size is k.
cublasStatus_t product(cudaStream_t stream, bool a_transposed, bool b_transposed, int64_t m, int64_t n,
                       int64_t k, Operand a, Operand b, Operand c, int64_t batch) {
    const std::lock_guard lock(mutex);
    if (enter(stream, "a matrix product")) return CUBLAS_STATUS_EXECUTION_FAILED;
    a.rows = a_transposed ? k : m;
    a.columns = a_transposed ? m : k;
    b.rows = b_transposed ? n : k;
    b.columns = b_transposed ? k : n;
    c.rows = m;
    c.columns = n;
    for (const Operand& x : {a, b, c}) {
        if (x.rows < 0 || x.columns < 0 || x.leading < std::max<int64_t>(1, x.rows)) {
            complain(std::string("operand ") + x.name +
                     " of a matrix product: a leading dimension too small");
            return CUBLAS_STATUS_INVALID_VALUE;
        }
        check(x, batch);
    }
    return CUBLAS_STATUS_SUCCESS;
}

// Of the functions that differ in their types and in what they take beside.
cublasStatus_t gemm(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op, int m, int n,
                    int k, const void* a, cudaDataType a_type, int lda, long long a_stride, const void* b,
                    cudaDataType b_type, int ldb, long long b_stride, const void* c, cudaDataType c_type,
                    int ldc, long long c_stride, int batch) {
    return product(of(handle).stream, a_op != CUBLAS_OP_N, b_op != CUBLAS_OP_N, m, n, k,
                   {"A", a, a_type, 0, 0, lda, a_stride}, {"B", b, b_type, 0, 0, ldb, b_stride},
                   {"C", c, c_type, 0, 0, ldc, c_stride}, batch);
}

}  // namespace
}  // namespace simulated

using namespace simulated;

// --- handles

SIMULATED cublasStatus_t cublasCreate_v2(cublasHandle_t* out) {
    *out = reinterpret_cast<cublasHandle_t>(new Handle{device});
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }  // at exit
SIMULATED cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    of(handle).stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes) {
    of(handle);
    size_t room = 0;
    if (bytes && (!find(workspace, &room) || room < bytes)) complain("cuBLAS' workspace leaves its memory");
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    of(handle).math = mode;
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
    *mode = of(handle).math;
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
    of(handle).pointers = mode;
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t* mode) {
    *mode = of(handle).pointers;
    return CUBLAS_STATUS_SUCCESS;
}

// --- products

SIMULATED cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op,
                                        int m, int n, int k, const float*, const float* a, int lda,
                                        const float* b, int ldb, const float*, float* c, int ldc) {
    return gemm(handle, a_op, b_op, m, n, k, a, CUDA_R_32F, lda, 0, b, CUDA_R_32F, ldb, 0, c, CUDA_R_32F, ldc,
                0, 1);
}
SIMULATED cublasStatus_t cublasDgemm_v2(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op,
                                        int m, int n, int k, const double*, const double* a, int lda,
                                        const double* b, int ldb, const double*, double* c, int ldc) {
    return gemm(handle, a_op, b_op, m, n, k, a, CUDA_R_64F, lda, 0, b, CUDA_R_64F, ldb, 0, c, CUDA_R_64F, ldc,
                0, 1);
}
SIMULATED cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t a_op,
                                                   cublasOperation_t b_op, int m, int n, int k, const float*,
                                                   const float* a, int lda, long long a_stride,
                                                   const float* b, int ldb, long long b_stride, const float*,
                                                   float* c, int ldc, long long c_stride, int batch) {
    return gemm(handle, a_op, b_op, m, n, k, a, CUDA_R_32F, lda, a_stride, b, CUDA_R_32F, ldb, b_stride, c,
                CUDA_R_32F, ldc, c_stride, batch);
}
SIMULATED cublasStatus_t cublasDgemmStridedBatched(cublasHandle_t handle, cublasOperation_t a_op,
                                                   cublasOperation_t b_op, int m, int n, int k, const double*,
                                                   const double* a, int lda, long long a_stride,
                                                   const double* b, int ldb, long long b_stride,
                                                   const double*, double* c, int ldc, long long c_stride,
                                                   int batch) {
    return gemm(handle, a_op, b_op, m, n, k, a, CUDA_R_64F, lda, a_stride, b, CUDA_R_64F, ldb, b_stride, c,
                CUDA_R_64F, ldc, c_stride, batch);
}
SIMULATED cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op,
                                      int m, int n, int k, const void*, const void* a, cudaDataType a_type,
                                      int lda, const void* b, cudaDataType b_type, int ldb, const void*,
                                      void* c, cudaDataType c_type, int ldc, cublasComputeType_t,
                                      cublasGemmAlgo_t) {
    return gemm(handle, a_op, b_op, m, n, k, a, a_type, lda, 0, b, b_type, ldb, 0, c, c_type, ldc, 0, 1);
}
SIMULATED cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t a_op,
                                                    cublasOperation_t b_op, int m, int n, int k, const void*,
                                                    const void* a, cudaDataType a_type, int lda,
                                                    long long a_stride, const void* b, cudaDataType b_type,
                                                    int ldb, long long b_stride, const void*, void* c,
                                                    cudaDataType c_type, int ldc, long long c_stride,
                                                    int batch, cublasComputeType_t, cublasGemmAlgo_t) {
    return gemm(handle, a_op, b_op, m, n, k, a, a_type, lda, a_stride, b, b_type, ldb, b_stride, c, c_type,
                ldc, c_stride, batch);
}

// --- cuBLASLt

SIMULATED size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
SIMULATED cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* out, cudaDataType type,
                                                    uint64_t rows, uint64_t columns, int64_t leading) {
    *out = reinterpret_cast<cublasLtMatrixLayout_t>(
        new Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), leading});
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete &of(layout);
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                          cublasLtMatrixLayoutAttribute_t which,
                                                          const void* value, size_t) {
    if (which == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) of(layout).batch = *static_cast<const int32_t*>(value);
    if (which == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET)
        of(layout).stride = *static_cast<const int64_t*>(value);
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* out, cublasComputeType_t,
                                                  cudaDataType_t) {
    *out = reinterpret_cast<cublasLtMatmulDesc_t>(new Description);
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    delete &of(description);
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                                        cublasLtMatmulDescAttributes_t which,
                                                        const void* value, size_t) {
    if (which == CUBLASLT_MATMUL_DESC_TRANSA)
        of(description).a_transposed = *static_cast<const int32_t*>(value);
    if (which == CUBLASLT_MATMUL_DESC_TRANSB)
        of(description).b_transposed = *static_cast<const int32_t*>(value);
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* out) {
    static long some_preference;
    *out = reinterpret_cast<cublasLtMatmulPreference_t>(&some_preference);
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t) {
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                              cublasLtMatmulPreferenceAttributes_t,
                                                              const void*, size_t) {
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                                        cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                        cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                        cublasLtMatmulPreference_t, int,
                                                        cublasLtMatmulHeuristicResult_t* out, int* count) {
    *out = {};
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}
SIMULATED cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t description, const void*,
                                        const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                                        cublasLtMatrixLayout_t b_layout, const void*, const void*,
                                        cublasLtMatrixLayout_t, void* c, cublasLtMatrixLayout_t c_layout,
                                        const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t stream) {
    const Description& how = of(description);
    const Layout &la = of(a_layout), &lb = of(b_layout), &lc = of(c_layout);
    const int64_t k = how.a_transposed ? la.rows : la.columns;
    return product(stream, how.a_transposed, how.b_transposed, lc.rows, lc.columns, k,
                   {"A", a, la.type, 0, 0, la.leading, la.stride},
                   {"B", b, lb.type, 0, 0, lb.leading, lb.stride},
                   {"C", c, lc.type, 0, 0, lc.leading, lc.stride}, lc.batch);
}
