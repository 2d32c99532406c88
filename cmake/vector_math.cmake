# glibc's vector mathematics (kernels/vector_math.h) where the C library has every function that is declared there.
include(CheckCXXSourceCompiles)

function(flatcore_add_vector_math target)
    set(CMAKE_REQUIRED_LIBRARIES mvec)
    check_cxx_source_compiles(
        "extern \"C\" { void _ZGVbN4v_tanhf(); void _ZGVbN4v_erff(); void _ZGVbN2v_erf(); void _ZGVbN2v_expm1(); }
        int main() { _ZGVbN4v_tanhf(); _ZGVbN4v_erff(); _ZGVbN2v_erf(); _ZGVbN2v_expm1(); }"
        FLATCORE_HAS_LIBMVEC
    )
    if(FLATCORE_HAS_LIBMVEC AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        target_compile_definitions(${target} INTERFACE FLATCORE_LIBMVEC)
        target_link_libraries(${target} INTERFACE mvec)
    endif()
endfunction()
