#!/usr/bin/env bash
# Run pytest against a libllama whose ReasonAlloc parts are built with the address and undefined
# sanitizers (Linux, gcc). Uses the build folder that `pip install .` left, so that llama.cpp itself
# is not compiled again. Arguments go to pytest: bash native/cmake/sanitized_pytest.sh -m sanitize
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folders=(build/py3-none-linux_*)
build="${folders[0]}"
if [[ ! -f "$build/CMakeCache.txt" ]]; then
    echo "no build folder of 'pip install .' found: run that first" >&2
    exit 2
fi
out="$PWD/build/sanitized"
configure() {
    cmake -S . -B "$build" -DREASONALLOC_SANITIZE="$1" -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" \
        -DPython_EXECUTABLE="$(command -v python)" >"$build/sanitize-configure.log" 2>&1 || {
        cat "$build/sanitize-configure.log" >&2
        exit 2
    }
}
restore() { configure OFF && cmake --build "$build" --target reasonalloc >/dev/null; }
trap restore EXIT

configure ON
cmake --build "$build" --target reasonalloc
mkdir -p "$out"
cp "$build"/bin/lib*.so "$out/"

compiler="$(sed -n 's/^CMAKE_C_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")"
status=0
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 LLAMA_CPP_LIB_PATH="$out" python -m pytest "$@" || status=$?
if [[ $status -eq 5 ]]; then
    echo "no test selected"
    status=0
fi
exit "$status"
