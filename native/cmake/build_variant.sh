#!/usr/bin/env bash
# Build another libllama in the build folder that `pip install .` left, where most of llama.cpp is
# compiled already (Linux). The libraries go to build/VARIANT; the build folder is restored.
#   stock      the pinned llama.cpp without our patch and code, for comparisons
#   sanitized  our code under the address and undefined-behaviour sanitizers
# Point LLAMA_CPP_LIB_PATH at the result to load it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case "${1:-}" in
    stock) option=REASONALLOC_STOCK ;;
    sanitized) option=REASONALLOC_SANITIZE ;;
    *)
        echo "usage: $0 stock|sanitized" >&2
        exit 2
        ;;
esac

source native/cmake/build_folder.sh

build_with() {
    local log="$build/$1.log"
    {
        "$cmake" -S . -B "$build" -D"$option=$2" -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" \
            -DPython_EXECUTABLE="$python" &&
            "$cmake" --build "$build" --target reasonalloc
    } >"$log" 2>&1 || {
        cat "$log" >&2
        return 1
    }
}
trap 'build_with restore OFF' EXIT

build_with "$1" ON
mkdir -p "build/$1"
cp "$build"/bin/lib*.so "build/$1/"
trap - EXIT
build_with restore OFF
echo "$PWD/build/$1"
