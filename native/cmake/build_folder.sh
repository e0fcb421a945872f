# Sourced by the scripts beside it: the build folder that `pip install .` left, and its tools (Linux).
# Sets, with the repository's root as the current folder,
#   build   the folder
#   cmake   the CMake that made it, if it is still there: another version may recompile everything
#   python  one that can run the build: in PATH, in .venv, or python3
#   cached NAME            prints what the folder was configured with
#   source_archive [PATH]  prints the path of the llama-cpp-python source distribution: that file, or the newest
#                          in that folder; without one, in the download cache
# and puts the tools beside that python (cmake, ninja) into PATH.

folders=(build/py3-none-linux_*)
build="${folders[0]}"
if [[ ! -f "$build/CMakeCache.txt" ]]; then
    echo "no build folder of 'pip install .' found: run that first" >&2
    exit 2
fi

python=""
for candidate in python .venv/bin/python python3; do
    if candidate="$(command -v "$candidate")" && "$candidate" -c 'import patch_ng' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [[ -z "$python" ]]; then
    echo "no python with patch-ng found: pip install '.[test,dev]' into a virtual environment, and activate it" >&2
    exit 2
fi
[[ "$python" == /* ]] || python="$PWD/$python"
PATH="$(dirname "$python"):$PATH"

cached() { sed -n "s/^$1:[A-Z]*=//p" "$build/CMakeCache.txt"; }

cmake="$(cached CMAKE_COMMAND)"
[[ -x "$cmake" ]] || cmake=cmake
for tool in "$cmake" ninja; do
    if ! command -v "$tool" >/dev/null; then
        echo "no $tool found: pip install '.[dev]'" >&2
        exit 2
    fi
done

source_archive() {
    local folder="${1:-${REASONALLOC_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/reasonalloc}}"
    local archives=("$folder"/llama_cpp_python-*.tar.gz)
    local archive="${archives[-1]}"
    [[ -f "$folder" ]] && archive="$folder"
    if [[ ! -f "$archive" ]]; then
        echo "$archive: no such file: name the llama-cpp-python source distribution" >&2
        return 2
    fi
    echo "$archive"
}
