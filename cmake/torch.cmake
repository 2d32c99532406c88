# The torch of the building Python, as the INTERFACE library flatcore_torch.
# Sets TORCH_VERSION and TORCH_CUDA (its CUDA version, or "none"). torch is read, not imported, and its own CMake
# package is not used: for a CUDA build of torch that demands the whole CUDA toolkit and overrides the architectures.
# PYTHONPATH is unset because pip points it at an isolated environment that holds no torch.
execute_process(
    COMMAND
        ${CMAKE_COMMAND} -E env --unset=PYTHONPATH ${Python_EXECUTABLE} -c
        [[
import importlib.util, pathlib, runpy, sys
spec = importlib.util.find_spec("torch") or sys.exit(1)
folder = pathlib.Path(spec.origin).parent
version = runpy.run_path(str(folder / "version.py"))
print(folder, version["__version__"], version["cuda"] or "none", sep=";", end="")
]]
    OUTPUT_VARIABLE TORCH_FACTS
    RESULT_VARIABLE TORCH_MISSING
)
if(TORCH_MISSING)
    message(
        FATAL_ERROR
        "No torch in ${Python_EXECUTABLE}: install torch first, then flatcore with `pip install --no-build-isolation .`"
    )
endif()
list(GET TORCH_FACTS 0 TORCH_FOLDER)
list(GET TORCH_FACTS 1 TORCH_VERSION)
list(GET TORCH_FACTS 2 TORCH_CUDA)
message(STATUS "torch ${TORCH_VERSION} (CUDA ${TORCH_CUDA}) in ${TORCH_FOLDER}")
# Another torch put in the same place is noticed by the next build.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${TORCH_FOLDER}/version.py)

# Both sides must agree on std::string: torch's libraries show which ABI they were built with.
file(STRINGS ${TORCH_FOLDER}/lib/libc10.so NEW_STRING_ABI REGEX "__cxx11" LIMIT_COUNT 1)
if(NEW_STRING_ABI)
    set(STRING_ABI 1)
else()
    set(STRING_ABI 0)
endif()

add_library(flatcore_torch INTERFACE)
target_include_directories(
    flatcore_torch
    SYSTEM
    INTERFACE ${TORCH_FOLDER}/include ${TORCH_FOLDER}/include/torch/csrc/api/include
)
target_compile_definitions(flatcore_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${STRING_ABI})
# What torch's checks say names their file: no path of the building machine.
target_compile_options(
    flatcore_torch
    INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${TORCH_FOLDER}/=>
)
foreach(name torch_cpu c10 torch_python)
    target_link_libraries(flatcore_torch INTERFACE ${TORCH_FOLDER}/lib/lib${name}.so)
endforeach()
