#!/usr/bin/env bash
# Build tests/archs/check_archs.cpp, which decodes random models of llama.cpp's architectures with a
# budget and without, against the libraries of the build folder that `pip install .` left (Linux; seconds).
# Prints the path of the program. The models are made by llama.cpp's own test-llama-archs.cpp, from the
# source distribution in the download cache, or from the file or folder named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source native/cmake/build_folder.sh

archive="$(source_archive "${1:-}")"

out="build/check_archs"
tree="$build/llama_cpp_python/vendor/llama.cpp"
program="$out/check_archs"
libraries="$PWD/$build/bin"
mkdir -p "$out/tests"
tar -xzOf "$archive" --wildcards '*/vendor/llama.cpp/tests/test-llama-archs.cpp' \
    >"$out/tests/test-llama-archs.cpp"
mkdir -p "$out/src"
cp "$tree"/src/llama-{arch,model-saver}.h "$out/src/" # as that file includes them: ../src/

compiler="$(cached CMAKE_CXX_COMPILER)"
"$compiler" -std=c++17 -O0 -Itests/archs -I"$out" -I"$tree/include" -I"$tree/ggml/include" \
    -I"$tree/src" -Inative/include tests/archs/check_archs.cpp -o "$program" \
    -L"$libraries" -lllama -lggml -lggml-base -Wl,-rpath,"$libraries"
echo "$PWD/$program"
