# What goes into the wheel, all of it in one install component.

if(SKBUILD)
    set(platlib "${SKBUILD_PLATLIB_DIR}")
else()
    set(platlib "${CMAKE_INSTALL_PREFIX}/python")
endif()

# libllama and the ggml libraries and backends that were configured.
function(reasonalloc_collect_libraries result directory)
    get_property(targets DIRECTORY "${directory}" PROPERTY BUILDSYSTEM_TARGETS)
    get_property(children DIRECTORY "${directory}" PROPERTY SUBDIRECTORIES)
    set(found "")
    foreach(target ${targets})
        get_target_property(type ${target} TYPE)
        if(type MATCHES "^(SHARED|MODULE)_LIBRARY$" AND target MATCHES "^(llama|ggml.*)$")
            list(APPEND found ${target})
        endif()
    endforeach()
    foreach(child ${children})
        reasonalloc_collect_libraries(below "${child}")
        list(APPEND found ${below})
    endforeach()
    set(${result} "${found}" PARENT_SCOPE)
endfunction()

reasonalloc_collect_libraries(libraries "${llama_tree}")
add_custom_target(reasonalloc ALL)
add_dependencies(reasonalloc ${libraries})
install(TARGETS ${libraries}
        LIBRARY DESTINATION "${platlib}/llama_cpp/lib" COMPONENT reasonalloc
        RUNTIME DESTINATION "${platlib}/llama_cpp/lib" COMPONENT reasonalloc
        ARCHIVE DESTINATION "${platlib}/llama_cpp/lib" COMPONENT reasonalloc # import libraries
        PUBLIC_HEADER DESTINATION "include" COMPONENT reasonalloc_unused EXCLUDE_FROM_ALL)

# ggml's CPU library needs the compiler's OpenMP runtime, which not every machine has.
if(GGML_OPENMP AND CMAKE_SYSTEM_NAME STREQUAL "Linux" AND CMAKE_READELF)
    foreach(runtime "${OpenMP_gomp_LIBRARY}" "${OpenMP_omp_LIBRARY}" "${OpenMP_iomp5_LIBRARY}")
        if(NOT EXISTS "${runtime}")
            continue()
        endif()
        get_filename_component(runtime "${runtime}" REALPATH)
        execute_process(COMMAND "${CMAKE_READELF}" -d "${runtime}" OUTPUT_VARIABLE dynamic)
        if(dynamic MATCHES "SONAME[^[]*\\[([^]]+)\\]")
            install(FILES "${runtime}" DESTINATION "${platlib}/llama_cpp/lib"
                    RENAME "${CMAKE_MATCH_1}" COMPONENT reasonalloc)
        endif()
    endforeach()
endif()

# The bindings of the same release, unmodified.
install(DIRECTORY "${REASONALLOC_LLAMA_DIR}/llama_cpp" DESTINATION "${platlib}"
        COMPONENT reasonalloc PATTERN "__pycache__" EXCLUDE)

# For programs in C: headers, a CMake package, a pkg-config file. They find each other by their
# places relative to one another, so that the installed folder may be moved.
set(package "${CMAKE_CURRENT_LIST_DIR}/package")
file(GLOB headers CONFIGURE_DEPENDS "${native}/include/*.h" "${llama_tree}/include/*.h"
     "${llama_tree}/ggml/include/*.h")
install(FILES ${headers} DESTINATION "${platlib}/py_reasonalloc/include" COMPONENT reasonalloc)
include(CMakePackageConfigHelpers)
write_basic_package_version_file("${CMAKE_BINARY_DIR}/reasonalloc-config-version.cmake"
                                 VERSION "${PROJECT_VERSION}" COMPATIBILITY SameMinorVersion)
configure_file("${package}/reasonalloc.pc.in" "${CMAKE_BINARY_DIR}/reasonalloc.pc" @ONLY)
install(FILES "${package}/reasonalloc-config.cmake"
              "${CMAKE_BINARY_DIR}/reasonalloc-config-version.cmake"
        DESTINATION "${platlib}/py_reasonalloc/cmake" COMPONENT reasonalloc)
install(FILES "${CMAKE_BINARY_DIR}/reasonalloc.pc"
        DESTINATION "${platlib}/py_reasonalloc/pkgconfig" COMPONENT reasonalloc)
install(DIRECTORY "${CMAKE_SOURCE_DIR}/profiles" DESTINATION "${platlib}/py_reasonalloc"
        COMPONENT reasonalloc OPTIONAL FILES_MATCHING PATTERN "*.json")
