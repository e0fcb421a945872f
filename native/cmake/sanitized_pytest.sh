#!/usr/bin/env bash
# Run pytest with our part of libllama under the address and undefined-behaviour sanitizers
# (Linux, gcc; after `pip install .`). Arguments go to pytest:
#   bash native/cmake/sanitized_pytest.sh -k engine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

libraries="$(bash native/cmake/build_variant.sh sanitized | tail -n 1)"
source native/cmake/build_folder.sh
compiler="$(cached CMAKE_C_COMPILER)"
preload="$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libstdc++.so)"

# Python itself never frees all of its memory, so leaks are not looked for.
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 LLAMA_CPP_LIB_PATH="$libraries" \
    "$python" -m pytest "$@"
