# Makes the folder PACKAGE the package with another extension: its Python files are the source tree's own.
file(GLOB PYTHON_FILES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/flatcore/*)
list(FILTER PYTHON_FILES EXCLUDE REGEX "/(_C[.].*[.]so|_build[.]py|__pycache__)$")
file(MAKE_DIRECTORY ${PACKAGE})
foreach(file ${PYTHON_FILES})
    get_filename_component(name ${file} NAME)
    file(CREATE_LINK ${file} ${PACKAGE}/${name} SYMBOLIC)
endforeach()
