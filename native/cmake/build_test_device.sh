#!/usr/bin/env bash
# Build tests/devices, a ggml backend whose devices tests take for GPUs, against the libraries of the build
# folder that `pip install .` left (Linux; seconds). Prints the path of the library, for
# REASONALLOC_TEST_DEVICE.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source native/cmake/build_folder.sh

out="build/test_device"
ggml="$build/llama_cpp_python/vendor/llama.cpp/ggml"
library="$out/libreasonalloc-test-device.so"
mkdir -p "$out"
compiler="$(cached CMAKE_CXX_COMPILER)"
"$compiler" -std=c++17 -O1 -g -shared -fPIC -fvisibility=hidden -Wall -Wextra -Werror \
    -isystem "$ggml/include" -isystem "$ggml/src" tests/devices/*.cpp -o "$library" \
    -L"$build/bin" -lggml -lggml-cpu -lggml-base
echo "$PWD/$library"
