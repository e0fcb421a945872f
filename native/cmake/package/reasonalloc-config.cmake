# CMake package of an installed ReasonAlloc: find_package(reasonalloc), then link reasonalloc::llama.
# Everything is found from where this file lies, so the installation may be moved as a whole.

get_filename_component(_ra_site "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)
set(reasonalloc_INCLUDE_DIR "${_ra_site}/py_reasonalloc/include")
set(reasonalloc_LIB_DIR     "${_ra_site}/llama_cpp/lib")

foreach(_ra_name llama ggml ggml-base)
    string(MAKE_C_IDENTIFIER "reasonalloc_${_ra_name}_LIBRARY" _ra_variable)
    unset(${_ra_variable} CACHE) # another installation's, perhaps
    find_library(${_ra_variable} ${_ra_name} PATHS "${reasonalloc_LIB_DIR}" NO_DEFAULT_PATH)
    mark_as_advanced(${_ra_variable})
    if(NOT ${_ra_variable})
        set(reasonalloc_FOUND FALSE)
        set(reasonalloc_NOT_FOUND_MESSAGE "${reasonalloc_LIB_DIR} has no library ${_ra_name}")
        return()
    endif()
    if(NOT TARGET reasonalloc::${_ra_name})
        add_library(reasonalloc::${_ra_name} UNKNOWN IMPORTED)
        set_target_properties(reasonalloc::${_ra_name} PROPERTIES
            IMPORTED_LOCATION             "${${_ra_variable}}"
            INTERFACE_INCLUDE_DIRECTORIES "${reasonalloc_INCLUDE_DIR}"
            INTERFACE_COMPILE_DEFINITIONS "LLAMA_SHARED;GGML_SHARED;GGML_BACKEND_SHARED")
    endif()
endforeach()
set_target_properties(reasonalloc::llama PROPERTIES
    INTERFACE_LINK_LIBRARIES "reasonalloc::ggml;reasonalloc::ggml-base")
unset(_ra_site)
unset(_ra_name)
unset(_ra_variable)
