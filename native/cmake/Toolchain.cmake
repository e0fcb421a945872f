# Compilers, build type, and the flags of our own code.

include(CheckLanguage)

# Enable a language, or stop with what to do. check_language() tries the compiler in a scratch
# project, so a broken or missing one does not end in a page of CMake's own output.
macro(reasonalloc_enable_language lang variable)
    if(NOT DEFINED CMAKE_${lang}_COMPILER)
        check_language(${lang})
    endif()
    if(NOT CMAKE_${lang}_COMPILER)
        # Not kept: the next configuration shall look again.
        unset(CMAKE_${lang}_COMPILER CACHE)
        message(FATAL_ERROR
            "No working ${lang} compiler was found.\n"
            "ReasonAlloc compiles llama.cpp and needs a C11 and a C++17 compiler:\n"
            "  Debian, Ubuntu:  apt install build-essential\n"
            "  Fedora:          dnf install gcc gcc-c++\n"
            "  macOS:           xcode-select --install\n"
            "A compiler in another place: set the environment variables CC and CXX "
            "(${variable} is '$ENV{${variable}}').\n")
    endif()
    enable_language(${lang})
endmacro()

reasonalloc_enable_language(C CC)
if(NOT REASONALLOC_CORE_ONLY)
    reasonalloc_enable_language(CXX CXX)
endif()

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    if(REASONALLOC_CORE_ONLY)
        set(CMAKE_BUILD_TYPE Debug CACHE STRING "Build type" FORCE)
    else()
        set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
    endif()
endif()

set(CMAKE_POSITION_INDEPENDENT_CODE ON)

# No path of the build machine in the libraries (assertions name their source file).
set(REASONALLOC_LLAMA_DIR "${CMAKE_BINARY_DIR}/llama_cpp_python")
foreach(pair "${CMAKE_SOURCE_DIR}=reasonalloc" "${CMAKE_BINARY_DIR}=build"
             "${REASONALLOC_LLAMA_DIR}/vendor=.")
    if(NOT MSVC)
        add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX,ASM,OBJC>:-ffile-prefix-map=${pair}>"
                            "$<$<COMPILE_LANGUAGE:CUDA,HIP>:-Xcompiler=-ffile-prefix-map=${pair}>")
    endif()
endforeach()

set(REASONALLOC_SANITIZE_FLAGS
    -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g)

# Settings of every target that holds our own code.
function(reasonalloc_own_code target)
    set_target_properties(${target} PROPERTIES
        C_STANDARD 11 C_STANDARD_REQUIRED ON C_EXTENSIONS OFF
        CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF
        C_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
        UNITY_BUILD OFF)
    if(MSVC)
        target_compile_options(${target} PRIVATE /W4 $<$<BOOL:${REASONALLOC_WERROR}>:/WX>)
    else()
        target_compile_options(${target} PRIVATE
            -Wall -Wextra $<$<BOOL:${REASONALLOC_WERROR}>:-Werror>)
    endif()
    if(REASONALLOC_SANITIZE)
        target_compile_options(${target} PRIVATE ${REASONALLOC_SANITIZE_FLAGS})
        target_link_options(${target} PUBLIC -fsanitize=address,undefined)
    endif()
endfunction()
