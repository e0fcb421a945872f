# Which room of native/ sees the headers of which: one compiler run per pair.

set(header_core   core.h)
set(header_policy policy.h)
set(header_alloc  alloc.h)
set(header_engine cache.h)
set(header_llama  ra_tensors.h)
set(seen_core     core)
set(seen_policy   core policy)
set(seen_alloc    core alloc)
set(seen_engine   core policy alloc engine)

if(MSVC)
    set(check_syntax /nologo /Zs)
else()
    set(check_syntax -std=c11 -fsyntax-only)
endif()
foreach(room core policy alloc engine)
    set(folders "$<TARGET_PROPERTY:reasonalloc_${room},INCLUDE_DIRECTORIES>")
    foreach(other core policy alloc engine llama)
        set(header ${header_${other}})
        set(source "${CMAKE_CURRENT_BINARY_DIR}/rooms/${room}_${other}.c")
        file(WRITE "${source}" "#include \"${header}\"\n")
        set(name "room_${room}_includes_${other}")
        add_test(NAME ${name} COMMAND "${CMAKE_C_COMPILER}" ${check_syntax}
                 "-I$<JOIN:$<REMOVE_DUPLICATES:${folders}>,;-I>" "${source}" COMMAND_EXPAND_LISTS)
        if(NOT other IN_LIST seen_${room})
            # fails, and for this reason
            set_tests_properties(${name} PROPERTIES PASS_REGULAR_EXPRESSION
                "${header}'?:? (No such file|file not found)|Cannot open include file: '${header}'")
        endif()
    endforeach()
endforeach()

# Nothing gets around the folders with a path in an include. The public header is not in a room.
file(GLOB_RECURSE sources CONFIGURE_DEPENDS "${native}/*.c" "${native}/*.h" "${native}/*.cpp")
foreach(source ${sources})
    file(STRINGS "${source}" lines REGEX "^ *# *include *\"[^\"]*/")
    if(lines)
        message(FATAL_ERROR "${source}: ${lines}: include headers of native/ by plain name")
    endif()
endforeach()
