#!/usr/bin/env python3
"""Instructions of a decode step and of a compression, counted by callgrind: repeatable anywhere.

    python tests/native/count_instructions.py [--heads uniform] [--budget 240] [--buffer 16]
    python tests/native/count_instructions.py --stock

decodes the demo model on one thread and prints instructions per decode step (without compressions),
per compression, and the share of compressions. --stock counts decode steps with no budget at depth
256, for the comparison of two builds: LLAMA_CPP_LIB_PATH=build/stock is one without our patch
(native/cmake/build_variant.sh). Needs valgrind, a build without AVX-512 (the default
one), and the libraries in the build folder that `pip install .` leaves: the installed ones have no
names of functions. The same library gives the same numbers to within 0.1%; compare numbers of one
compiler and one set of CPU options only. About a minute.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
N_COMPRESSIONS = 4


def decode(args: argparse.Namespace, n_steps: int) -> None:
    """What is counted: fill every segment with a prompt, then decode one token at a time."""
    sys.path.insert(0, str(ROOT / "tests" / "python"))
    from engine import Engine

    from py_reasonalloc.task.shipped import DEMO_MODEL

    tokens = [4 + (i * i + i // 7) % 56 for i in range(args.budget + args.buffer + n_steps)]
    config = {"buffer": args.buffer, "head_alloc": args.heads, "policy": args.policy}
    with Engine(DEMO_MODEL, args.budget, n_ubatch=args.buffer, config=config) as engine:
        n_prompt = args.budget + args.buffer
        engine.decode(tokens[:n_prompt])
        assert engine.stats().n_compressions == 0
        for token in tokens[n_prompt:]:
            engine.decode([token])
        assert engine.stats().n_compressions == n_steps // args.buffer


def decode_stock(n_steps: int) -> None:
    """What is counted with --stock: no budget, none of our functions."""
    from py_reasonalloc.bench.engine import Engine
    from py_reasonalloc.bench.jobs import Arm, Job
    from py_reasonalloc.task.shipped import DEMO_MODEL

    with Engine(Job("decode", Arm("stock"), str(DEMO_MODEL), n_threads=1)) as engine:
        engine.open_context(512)
        engine.read(256, 0)
        engine.step(n_steps, 256)


def libraries() -> str:
    """Folder of the libraries that still have all symbols; LLAMA_CPP_LIB_PATH names another."""
    found = sorted(str(path.parent) for path in ROOT.glob("build/py3-none-*/bin/libllama.*"))
    if not found and "LLAMA_CPP_LIB_PATH" not in os.environ:
        sys.exit("no build folder: run `pip install .` in the checkout first")
    return os.environ.get("LLAMA_CPP_LIB_PATH") or found[0]


def count(args: argparse.Namespace, function: str, n_steps: int) -> int:
    """Instructions spent in a function of libllama, callees included."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
        command += [f"--toggle-collect={function}", sys.executable, __file__, *sys.argv[1:]]
        command += ["--decode", str(n_steps)]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "LLAMA_CPP_LIB_PATH": libraries()},
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stdout}")
        total = re.search(r"^(?:totals|summary): (\d+)", out.read_text(), re.MULTILINE)
        assert total and int(total.group(1)) > 0, f"{function} was never entered"
        return int(total.group(1))


def main() -> None:
    """Parse the command line; count; print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--budget", type=int, default=240)
    parser.add_argument("--buffer", type=int, default=16)
    parser.add_argument("--heads", default="adaptive", help="head allocator")
    parser.add_argument("--policy", default="rkv")
    parser.add_argument("--stock", action="store_true", help="no budget")
    parser.add_argument("--decode", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode is not None:
        decode_stock(args.decode) if args.stock else decode(args, args.decode)
        return
    if args.stock:
        n_steps, step = 64, "llama_context::decode(llama_batch_ext*"
        steps = count(args, step, n_steps) - count(args, step, 0)
        print(f"decode step: {steps / n_steps / 1e6:.4f} M instructions")
        return
    n_steps = N_COMPRESSIONS * args.buffer
    step = "llama_context::process_ubatch*"
    compressions = count(args, "ra_memory::compress(int)", n_steps)
    steps = count(args, step, n_steps) - count(args, step, 0) - compressions
    print(f"decode step: {steps / n_steps / 1e6:.3f} M instructions")
    print(f"compression: {compressions / N_COMPRESSIONS / 1e6:.3f} M instructions")
    print(f"share of compressions: {100 * compressions / (steps + compressions):.1f}%")


if __name__ == "__main__":
    main()
