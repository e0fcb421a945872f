#!/usr/bin/env bash
# Build what the tests of devices need, against the libraries of the build folder that `pip install .` left
# (Linux; half a minute). Prints the folder, for REASONALLOC_TEST_DEVICES.
#   libreasonalloc-test-devices.so  tests/devices: a ggml backend whose devices tests take for GPUs
#   libggml-rpc.so                  ggml's own RPC backend, as it is loaded where ggml was built without it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source native/cmake/build_folder.sh

out="build/test_devices"
ggml="$build/llama_cpp_python/vendor/llama.cpp/ggml"
compiler="$(cached CMAKE_CXX_COMPILER)"
mkdir -p "$out"

library() {
    "$compiler" -std=c++17 -O1 -shared -fPIC -pthread -isystem "$ggml/include" -isystem "$ggml/src" \
        -L"$build/bin" "${@:2}" -o "$out/lib$1.so" -lggml -lggml-cpu -lggml-base
}
library reasonalloc-test-devices -g -fvisibility=hidden -Wall -Wextra -Werror tests/devices/*.cpp
library ggml-rpc -DGGML_BACKEND_DL -DGGML_BACKEND_SHARED -DGGML_BACKEND_BUILD \
    "$ggml"/src/ggml-rpc/{ggml-rpc,transport}.cpp
echo "$PWD/$out"
