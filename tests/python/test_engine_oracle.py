"""An independent oracle: NumPy computes what the engine should, with the engine's own kept sets.

The engine decodes with budgets that differ between layers and heads; a trace records which
positions every head kept at every compression. `NumpyModel` then runs the whole sequence with masks
made from these sets, and from its own queries and keys judges the policy's scores and choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import reference
from engine import Engine
from numpy_model import NumpyModel, write_f32_copy
from test_engine_parity import demo_prompt, random_tokens

# f32 weights and cache: what remains is the order of float32 sums. With float16 rows (flash
# attention casts f32 rows to it as well) llama.cpp rounds queries and accumulators too. For logits
# of size 10.
LOGIT_TOLERANCE = {"f32": 2e-3, "f16": 0.1}
SCORE_TOLERANCE = 2e-3

BUDGETS = [40, 26, 33, 60, 22, 48, 29, 35, 24, 51, 31, 44, 38, 27]


@dataclass
class Run:
    """A decoded sequence with its compressions."""

    engine_logits: np.ndarray
    tokens: list[int]
    traces: list
    model: NumpyModel

    def visible(self) -> list[np.ndarray]:
        """Per layer [n_head_kv, T, T]: which tokens each query could see, from the traces."""
        n = len(self.tokens)
        masks = [np.ones((self.model.n_head_kv, n, n), bool) for _ in range(self.model.n_layer)]
        for event in self.traces:
            for ih in range(self.model.n_head_kv):
                gone = event.positions[ih][~event.keep[ih]]
                masks[event.il][ih, event.n_pos :, gone] = False
        return masks


def run_engine(
    path: Path, tokens: list[int], n_prompt: int, kv: str, flash_attn: bool, config: dict
) -> Run:
    model = NumpyModel(path)
    n_heads = model.n_layer * model.n_head_kv
    config = {"buffer": 16, "head_budgets": (BUDGETS * 9)[:n_heads], **config}
    with Engine(path, 40, kv, flash_attn=flash_attn, config=config) as engine:
        engine.trace()
        logits = [engine.decode(tokens[:n_prompt]), engine.decode_each(tokens[n_prompt:])]
        stats = engine.stats()
        assert stats.n_compressions >= 5
        assert len(engine.traces) >= 5
        for il in range(model.n_layer):
            for ih in range(model.n_head_kv):
                events = [e for e in engine.traces if e.il == il]
                tail = np.arange(events[-1].n_pos, len(tokens))
                expected = np.concatenate([events[-1].kept(ih), tail])
                assert np.array_equal(engine.kept(il, ih), expected)
        return Run(np.concatenate(logits), tokens, engine.traces, model)


@pytest.fixture(scope="module")
def demo_f32(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with its quantised weights written out as f32."""
    return write_f32_copy(demo_model, tmp_path_factory.mktemp("demo") / "demo-f32.gguf")


@pytest.fixture(scope="module")
def demo_tokens(demo_f32: Path) -> tuple[list[int], int]:
    """A sample problem and 200 tokens of its chain of thought; the prompt's length."""
    from py_reasonalloc.demo.problems import SAMPLE_PROBLEM

    with Engine(demo_f32) as engine:
        prompt = demo_prompt(engine, SAMPLE_PROBLEM)
        return prompt + engine.greedy(prompt, 200), len(prompt)


@pytest.mark.parametrize(
    "kv,flash_attn", [("f32", False), ("f32", True), ("f16", True), ("f16", False)]
)
def test_demo_logits_after_compressions(demo_f32, demo_tokens, kv: str, flash_attn: bool) -> None:
    tokens, n_prompt = demo_tokens
    run = run_engine(demo_f32, tokens, n_prompt, kv, flash_attn, {})
    logits, _ = run.model.forward(tokens, run.visible())
    tolerance = LOGIT_TOLERANCE["f32" if kv == "f32" and not flash_attn else "f16"]
    assert np.abs(logits - run.engine_logits).max() < tolerance * np.abs(logits).max() / 10
    # the oracle can tell: without the evictions it computes something else
    full, _ = run.model.forward(tokens)
    assert np.abs(full - run.engine_logits).max() > 10 * tolerance


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("n_prompt", [1, 16, 23, 90])
def test_random_model_logits_after_compressions(make_gguf, arch: str, n_prompt: int) -> None:
    """Other architectures, prompts read in pieces of several sizes, longer than the budget too."""
    path = make_gguf(arch=arch, n_head=6, n_head_kv=2, head_dim=64, n_ctx_train=1024)
    tokens = random_tokens(180, seed=n_prompt)
    run = run_engine(path, tokens, n_prompt, "f32", False, {})
    logits, _ = run.model.forward(tokens, run.visible())
    assert np.abs(logits - run.engine_logits).max() < LOGIT_TOLERANCE["f32"]


@pytest.mark.parametrize("policy", ["rkv", "snapkv", "streaming", "random"])
def test_policy_on_real_queries_and_keys(demo_f32, demo_tokens, policy: str) -> None:
    """Scores and kept sets of the engine equal those of the NumPy reference."""
    tokens, n_prompt = demo_tokens
    config = {"policy": policy, "seed": 7, "n_window": 8, "n_sink": 4}
    run = run_engine(demo_f32, tokens, n_prompt, "f32", False, config)
    _, layers = run.model.forward(tokens, run.visible())
    n_group = run.model.n_head // run.model.n_head_kv
    n_compared = 0
    for event in run.traces:
        act = layers[event.il]
        for ih, pos in enumerate(event.positions):
            window = np.arange(event.n_pos - 8, event.n_pos)
            q = act.q[ih * n_group : (ih + 1) * n_group][:, window].transpose(1, 0, 2)
            expected = reference.forced_scores(
                reference.policy_score(
                    policy,
                    k=act.k[ih][pos],
                    q=q,
                    kq_scale=run.model.kq_scale,
                    pos=pos,
                    n_window=8,
                    il=event.il,
                    ih=ih,
                    seed=7,
                ),
                pos,
                n_sink=4,
                n_window=8,
                n_protect=0,
            )
            got = event.scores[ih]
            free = np.isfinite(expected)
            assert np.array_equal(np.isposinf(got), np.isposinf(expected))
            assert np.abs(got[free] - expected[free]).max(initial=0.0) < SCORE_TOLERANCE
            keep = reference.select_keep(expected, event.budgets[ih])
            # they may differ only on scores that the tolerance cannot tell apart
            cut = np.sort(expected[free])[::-1]
            n_free_kept = int(keep[free].sum())
            differ = free & (keep != event.keep[ih])
            if differ.any():
                edge = cut[max(0, n_free_kept - 1)]
                assert np.abs(expected[differ] - edge).max() < 2 * SCORE_TOLERANCE
            n_compared += int(free.sum())
    assert n_compared > 1000
