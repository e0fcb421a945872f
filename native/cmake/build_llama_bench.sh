#!/usr/bin/env bash
# Build llama.cpp's own llama-bench from the pinned sources, and lay it beside the libraries that
# `pip install .` left in the build folder, which it then runs on (Linux). About five minutes.
#
#   bash native/cmake/build_llama_bench.sh [llama_cpp_python-VERSION.tar.gz]
#
# prints the path for `reasonalloc-bench --llama-bench`. Without an argument it takes the sources
# that the build has downloaded. For figures on the very same files, point LLAMA_CPP_LIB_PATH at the
# folder of that path while reasonalloc-bench runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source native/cmake/build_folder.sh

archive="$(source_archive "${1:-}")"

work="build/llama-bench.work"
out="build/llama-bench"
rm -rf "$work/source"
mkdir -p "$work/source" "$out"
tar -xzf "$archive" -C "$work/source" --strip-components=3 --wildcards '*/vendor/llama.cpp'

# the options of native/cmake/LlamaCpp.cmake: a loader must take our libraries for these
log="$work/log"
# git must not find the repository around the build folder
export GIT_CEILING_DIRECTORIES="$PWD/build"
{
    "$cmake" -S "$work/source" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" -DGGML_NATIVE="$(cached GGML_NATIVE)" \
        -DBUILD_SHARED_LIBS=ON -DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON \
        -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DCMAKE_INSTALL_RPATH='$ORIGIN' \
        -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF &&
        "$cmake" --build "$work/build" --target llama-bench
} >"$log" 2>&1 || {
    tail -n 30 "$log" >&2
    exit 1
}
cp "$work"/build/bin/{llama-bench,lib*.so} "$out/"
cp "$build"/bin/lib*.so "$out/" # these, patched, take the place of the ones just built
"$out/llama-bench" --help >"$log.help" 2>&1 || {
    tail -n 5 "$log.help" >&2
    exit 1
}
echo "$PWD/$out/llama-bench"
