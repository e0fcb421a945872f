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

mkdir -p "$out"
if [[ -x "$program" && -z "$(find tests/archs native/include "$libraries" "$archive" -newer "$program" -type f)" ]]; then
    echo "$PWD/$program"
    exit
fi
# several may build it at once: each by itself, and the last one's stays
work="$(mktemp -d "$out/XXXXXX")"
trap 'rm -rf "$work"' EXIT
mkdir "$work"/{tests,src}
tar -xzOf "$archive" --wildcards '*/vendor/llama.cpp/tests/test-llama-archs.cpp' \
    >"$work/tests/test-llama-archs.cpp"
cp "$tree"/src/llama-{arch,model-saver}.h "$work/src/" # as that file includes them: ../src/

compiler="$(cached CMAKE_CXX_COMPILER)"
"$compiler" -std=c++17 -O0 -Itests/archs -I"$work" -I"$tree/include" -I"$tree/ggml/include" \
    -I"$tree/src" -Inative/include tests/archs/check_archs.cpp -o "$work/check_archs" \
    -L"$libraries" -lllama -lggml -lggml-base -Wl,-rpath,"$libraries"
mv "$work/check_archs" "$program"
echo "$PWD/$program"
