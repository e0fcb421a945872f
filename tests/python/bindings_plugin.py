"""A pytest plugin for the bindings' own tests: `llama_cpp.Llama` is a `ReasonLlama`.

Environment: REASONALLOC_TEST_MODEL, the GGUF that stands in for the models the tests download;
REASONALLOC_TEST_BUDGET and REASONALLOC_TEST_BUFFER, tokens ("none": the stock cache).
"""

from __future__ import annotations

import os
import sys
import types

import llama_cpp
import pytest

from py_reasonalloc import BudgetConfig, ReasonLlama

MODEL = os.environ["REASONALLOC_TEST_MODEL"]
BUDGET = os.environ["REASONALLOC_TEST_BUDGET"]
N_OPENED = N_EVICTED = 0


class Budgeted(ReasonLlama):
    """What an application would write to get a budget into code that names `llama_cpp.Llama`."""

    def __init__(self, model_path: str, **arguments: object) -> None:
        budget = None
        if BUDGET != "none":
            budget = BudgetConfig(
                budget=int(BUDGET), buffer=int(os.environ["REASONALLOC_TEST_BUFFER"])
            )
        super().__init__(model_path, budget=budget, **arguments)
        global N_OPENED
        N_OPENED += 1

    def close(self) -> None:
        global N_EVICTED
        ctx = getattr(self, "_ctx", None)
        if ctx is not None and ctx.ctx and self.config and not self.model_params.vocab_only:
            N_EVICTED += self.kv_stats().n_evicted
        super().close()


llama_cpp.Llama = Budgeted

hub = types.ModuleType("huggingface_hub")
hub.hf_hub_download = lambda repo_id, filename: MODEL
sys.modules["huggingface_hub"] = hub


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"sessions {N_OPENED}, evicted {N_EVICTED}")
