#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build for it, run the engine's tests on it, measure.
#
#   bash tests/gpu/check.sh OUT                   NVIDIA; needs the CUDA toolkit
#   bash tests/gpu/check.sh --backend metal OUT   Apple
#   bash tests/gpu/check.sh --backend cpu OUT     a rehearsal: no GPU, the demo's small shape
#
# --python FILE takes an environment in which the package is installed already, and builds nothing.
# Without a package index set PIP_NO_INDEX, PIP_FIND_LINKS and REASONALLOC_LLAMA_CPP
# (docs/building.md). Further arguments go to pytest. In OUT: build.log, tests.log, bench.json,
# bench.md, bench.svg. A stage that fails does not stop the next one; the exit code tells.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

backend=cuda
python=""
while [[ "${1:-}" == --* ]]; do
    case "$1" in
        --backend) backend="${2:-}" ;;
        --python) python="${2:-}" ;;
        *) backend="" ;;
    esac
    shift $(($# > 1 ? 2 : $#))
done
case "$backend" in
    cuda) build=(-C cmake.define.GGML_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native) ;;
    metal) build=(-C cmake.define.GGML_METAL=ON) ;;
    cpu) build=() ;;
    *) backend="" ;;
esac
if [[ -z "$backend" || -z "${1:-}" ]]; then
    echo "usage: $0 [--backend cuda|metal|cpu] [--python FILE] OUT [pytest arguments]" >&2
    exit 2
fi
mkdir -p "$1" && out="$(cd "$1" && pwd)" || exit 2
shift

failed=()
stage() {
    local name="$1" start=$SECONDS
    shift
    printf '=== %s\n' "$name"
    "$@" || failed+=("$name")
    printf '    %d s\n' $((SECONDS - start))
}

build() {
    python3 -m venv "$out/venv" &&
        "$out/venv/bin/pip" install --quiet ${build[@]+"${build[@]}"} '.[test,plot]'
}
if [[ -z "$python" ]]; then
    stage "build for $backend" build >"$out/build.log" 2>&1
    python="$out/venv/bin/python"
    if ((${#failed[@]})); then
        tail -n 20 "$out/build.log" >&2
        exit 1
    fi
fi

# the model is small, so all of it goes to the GPU
layers=0
[[ "$backend" == cpu ]] || layers=99
tests() {
    REASONALLOC_TEST_GPU_LAYERS=$layers "$python" -m pytest -q \
        tests/python/test_engine_{attention,memory,methods,oracle,parity,repack}.py \
        tests/python/test_state.py "$@" 2>&1 | tee "$out/tests.log"
}
stage "engine tests, $layers layers on the GPU" tests "$@"

# one operation per KV head against one masked operation per layer, where budgets are uneven
bench() {
    "$python" -m py_reasonalloc.commands.bench "$@" --splits even,uneven --attention head,layer \
        --stock f16 --json "$out/bench.json" --markdown "$out/bench.md" --plot "$out/bench.svg"
}
if [[ "$backend" == cpu ]]; then
    stage "benchmark" bench --shape demo --quick --depths 64,300 --budgets 48 --buffer 16 --prompts 100
else
    stage "benchmark" bench --shape r1-llama-8b --weights q4_k_m --gpu-layers -1 \
        --depths 512,8192,32768 --budgets 256,1024 --prompts 512,2048 --repeat 2
fi

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "all done: $out"
