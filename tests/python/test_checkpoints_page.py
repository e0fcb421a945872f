"""What docs/checkpoints.md shows runs as it is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from py_reasonalloc.commands import run as command

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SHELL = next(re.finditer(r"```sh\n(reasonalloc-run demo.*?)```", PAGE, flags=re.DOTALL))[1]


@pytest.mark.parametrize("code", PYTHON, ids=["checkpoints", "drafts"])
def test_python(code, demo_model, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").symlink_to(demo_model)
    # threads that wait for each other are slow on a machine that others use
    code = code.replace('"model.gguf",', '"model.gguf", n_threads=1, n_threads_batch=1,')
    exec(compile(code, "page", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out


def test_shell(in_process, tmp_path) -> None:
    def text_of(line: str) -> str:
        name, *arguments = shlex.split(line.replace("chain.state", str(tmp_path / "chain.state")))
        assert name == "reasonalloc-run"
        code, out, err = in_process(command.run, *arguments, "--threads", 1)
        assert code == 0, err
        return out.removesuffix("\n")

    pieces = [text_of(line) for line in SHELL.strip().splitlines()]
    assert len(pieces) == 3
    assert "".join(pieces) == text_of("reasonalloc-run demo --temp 0")
