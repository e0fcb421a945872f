# The pinned llama.cpp tree, patched, with our code inside its libllama.

set(Python_FIND_STRATEGY LOCATION) # the first one in PATH, not the newest
find_package(Python 3.9 COMPONENTS Interpreter REQUIRED)

# ---- the tree: fetched, verified, patched ----
set(source_args "")
if(REASONALLOC_LLAMA_CPP)
    if(REASONALLOC_LLAMA_CPP MATCHES "^~")
        set(given "${REASONALLOC_LLAMA_CPP}")
    else()
        get_filename_component(given "${REASONALLOC_LLAMA_CPP}" ABSOLUTE
                               BASE_DIR "${CMAKE_SOURCE_DIR}")
    endif()
    set(source_args --source "${given}")
endif()
if(REASONALLOC_STOCK)
    list(APPEND source_args --no-patches)
endif()
execute_process(
    COMMAND "${Python_EXECUTABLE}" -B "${CMAKE_CURRENT_LIST_DIR}/prepare_llama.py"
            --target "${REASONALLOC_LLAMA_DIR}" ${source_args}
    RESULT_VARIABLE prepare_result
    ERROR_VARIABLE  prepare_error)
if(NOT prepare_result EQUAL 0)
    message(FATAL_ERROR "${prepare_error}")
endif()

# A changed patch is picked up by a plain rebuild, too.
file(GLOB patch_files CONFIGURE_DEPENDS "${native}/patches/*")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${patch_files})

# ---- options of llama.cpp: defaults that -D or `pip -C cmake.define.` override ----
set(BUILD_SHARED_LIBS ON)
foreach(off LLAMA_BUILD_COMMON LLAMA_BUILD_TESTS LLAMA_BUILD_TOOLS LLAMA_BUILD_EXAMPLES
            LLAMA_BUILD_SERVER LLAMA_BUILD_APP LLAMA_BUILD_UI LLAMA_USE_PREBUILT_UI
            LLAMA_BUILD_MTMD LLAMA_OPENSSL LLAMA_CURL GGML_BUILD_TESTS GGML_BUILD_EXAMPLES)
    set(${off} OFF CACHE BOOL "Not part of this package" FORCE)
endforeach()
set(GGML_NATIVE OFF CACHE BOOL "Compile for this machine's CPU only (not for other machines)")
# OpenMP stays on (ggml's default): without it ggml starts its threads anew for every token and
# spins at barriers, which on a busy machine costs a small model most of its speed. Its runtime
# library goes into the package (InstallPackage.cmake).
if(NOT GGML_NATIVE AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    # ggml drops these when SOURCE_DATE_EPOCH is set; a package must not depend on that.
    foreach(isa GGML_SSE42 GGML_AVX GGML_AVX2 GGML_BMI2 GGML_FMA GGML_F16C)
        set(${isa} ON CACHE BOOL "Instruction set of x86-64 CPUs since about 2013")
    endforeach()
endif()

# One file per library, found beside each other wherever the package lies.
set(CMAKE_PLATFORM_NO_VERSIONED_SONAME ON)
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
if(APPLE)
    set(CMAKE_INSTALL_RPATH "@loader_path")
else()
    set(CMAKE_INSTALL_RPATH "$ORIGIN")
endif()
if(GGML_CUDA OR GGML_HIP)
    set(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON) # the toolkit may lie outside the loader's path
endif()

# llama.cpp asks git for its commit: it must not find the repository around the build folder.
set(ENV{GIT_CEILING_DIRECTORIES} "${CMAKE_BINARY_DIR}")
unset(ENV{GIT_DIR})
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT "pinned")

set(llama_tree "${REASONALLOC_LLAMA_DIR}/vendor/llama.cpp")
add_subdirectory("${llama_tree}" "${CMAKE_BINARY_DIR}/llama.cpp" EXCLUDE_FROM_ALL)

# ---- our code in libllama ----
# The same for both variants, so that switching compiles only the patched files.
target_include_directories(llama PRIVATE "${native}/include" "${native}/llama")
if(REASONALLOC_STOCK)
    return()
endif()
file(GLOB llama_sources CONFIGURE_DEPENDS "${native}/llama/*.cpp" "${native}/llama/*.h")
if(llama_sources)
    add_library(reasonalloc_llama OBJECT ${llama_sources})
    target_include_directories(reasonalloc_llama PRIVATE "${native}/llama")
    target_include_directories(reasonalloc_llama SYSTEM PRIVATE
        "${llama_tree}/src" "${llama_tree}/include" "${llama_tree}/ggml/include"
        "${llama_tree}/ggml/src")
    target_link_libraries(reasonalloc_llama PRIVATE reasonalloc_engine ggml)
    target_compile_definitions(reasonalloc_llama PRIVATE LLAMA_SHARED LLAMA_BUILD)
    reasonalloc_own_code(reasonalloc_llama)
    set_target_properties(reasonalloc_llama PROPERTIES LINKER_LANGUAGE CXX)
    target_sources(llama PRIVATE $<TARGET_OBJECTS:reasonalloc_llama>)
endif()
foreach(room ${reasonalloc_rooms})
    target_sources(llama PRIVATE $<TARGET_OBJECTS:${room}>)
endforeach()
if(UNIX)
    target_link_libraries(llama PRIVATE m)
endif()
if(REASONALLOC_SANITIZE)
    target_link_options(llama PRIVATE -fsanitize=address,undefined)
endif()
