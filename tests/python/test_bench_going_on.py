"""The benchmarks of checkpoints and drafts, on the demo model."""

from __future__ import annotations

import re

from py_reasonalloc.bench import checkpoints, drafts


def test_checkpoints(in_process, demo_model) -> None:
    arguments = ("--tokens", 1024, "--budget", 96, "--repeat", 1, "--threads", 1)
    code, out, err = in_process(checkpoints.run, demo_model, *arguments)
    assert (code, err) == (0, "")
    for case in checkpoints.CASES:
        seconds = r" +([\d.]+) s, +(\d+) tokens"
        found = re.search(case + seconds + seconds + r" +[\d.]+x", out)
        assert found, out
        assert int(found[2]) == 1024 > 200 > int(found[4]) > 0
    assert "texts are the same" in out


def test_drafts(in_process) -> None:
    arguments = ("-n", 60, "--repeat", 1, "--threads", 1)
    code, out, err = in_process(drafts.run, "demo", *arguments)
    assert (code, err) == (0, "")
    found = re.search(r"([\d.]+) tokens/s without drafts, ([\d.]+) with", out)
    assert found, out
    assert min(map(float, found.groups())) > 0
    assert "the first 60 tokens are equal" in out


def test_usage(in_process, tmp_path) -> None:
    for command in (checkpoints.run, drafts.run):
        code, out, err = in_process(command, tmp_path / "none.gguf")
        assert (code, out) == (1, "")
        assert err.count("\n") == 1 and "no such file" in err
