#!/usr/bin/env bash
# Run pytest with our part of libllama under the address and undefined-behaviour sanitizers
# (Linux, gcc; after `pip install .`). Arguments go to pytest:
#   bash native/cmake/sanitized_pytest.sh -k engine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

libraries="$(bash native/cmake/build_variant.sh sanitized | tail -n 1)"
caches=(build/py3-none-linux_*/CMakeCache.txt)
compiler="$(sed -n 's/^CMAKE_C_COMPILER:[A-Z]*=//p' "${caches[0]}")"
preload="$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libstdc++.so)"

# Python itself never frees all of its memory, so leaks are not looked for.
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 LLAMA_CPP_LIB_PATH="$libraries" \
    python -m pytest "$@"
