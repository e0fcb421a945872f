"""The package's commands as processes, with bytes in and out, and odd model files for them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TIMEOUT
from gguf_factory import CHAT_TEMPLATE

FAILURE, USAGE = 1, 2
posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX")

NO_BOS_TEMPLATE = CHAT_TEMPLATE.replace("{{ bos_token }}", "")
THINKING_TEMPLATE = CHAT_TEMPLATE + "{% if thinks %}<think>{% endif %}{# </think> #}"


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: bytes
    err: bytes

    @property
    def report(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        assert self.err == b""
        return json.loads(self.out)


def run_bytes(name: str, *arguments: object, stdin: bytes = b"", shell: str = "") -> Done:
    """Run a command of the package with bytes in and out."""
    script = Path(sys.executable).parent / f"reasonalloc-{name}"
    command = [os.fsencode(script), *map(_argument, arguments)]
    if shell:  # a shell's redirection or limit, then the command
        command = [b"bash", b"-c", shell.encode(), *command]
    done = subprocess.run(
        command, input=stdin, capture_output=True, timeout=TIMEOUT, cwd=ROOT, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def _argument(value: object) -> bytes:
    return value if isinstance(value, bytes) else os.fsencode(str(value))


def assert_refused(done: Done, code: int, pattern: str, name: str = "reasonalloc-run") -> None:
    assert (done.code, done.out) == (code, b""), done
    lines = done.err.decode().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{name}: ")
    assert re.search(pattern, lines[0]), lines[0]


def write_odd_files(make_gguf: Callable[..., Path], folder: Path) -> dict[str, Path]:
    """Write model files that are not quite as they should be; return their paths by name."""
    plain = make_gguf(chat_template="QQ" + CHAT_TEMPLATE)
    changed = {
        "foreign-name": (b"random llama", b"caf\xe9om llama"),
        "foreign-template": (b"QQ{{", b"\xe9\xe8{{"),
        "no-length": (b"llama.context_length", b"llama.context_lengtX"),
    }
    files = {}
    for name, (old, new) in changed.items():
        data = plain.read_bytes()
        assert data.count(old) == 1
        files[name] = folder / f"{name}.gguf"
        files[name].write_bytes(data.replace(old, new))
    return files | {
        "plain": make_gguf(),
        "no-vocabulary": make_gguf(has_tokenizer=False),
        "length-0": make_gguf(n_ctx_train=0),
        "length-2^31": make_gguf(n_ctx_train=2**31 + 5),
        "empty-template": make_gguf(chat_template="{# nothing #}"),
        "broken-template": make_gguf(chat_template="{{ 1 / 0 }}"),
        "endless-template": make_gguf(
            chat_template="{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
        ),
    }
