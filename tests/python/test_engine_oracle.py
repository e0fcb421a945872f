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
import reference_alloc
from engine import Engine, random_centres
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
    path: Path | None = None

    def visible(self) -> list[np.ndarray]:
        """Per layer [n_head_kv, T, T]: which tokens each query could see, from the traces."""
        n = len(self.tokens)
        masks = [np.ones((self.model.n_head_kv, n, n), bool) for _ in range(self.model.n_layer)]
        for event in self.traces:
            for ih in range(self.model.n_head_kv):
                gone = event.positions[ih][~event.keep[ih]]
                masks[event.il][ih, event.n_pos :, gone] = False
        return masks

    def compressions(self) -> list[list]:
        """Per layer its compressions in order."""
        return [[e for e in self.traces if e.il == il] for il in range(self.model.n_layer)]

    def replay(self) -> tuple[np.ndarray, list]:
        """Logits and activations by NumPy, with what the engine kept and merged."""
        return self.model.forward(self.tokens, self.visible(), self.compressions())


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
        return Run(np.concatenate(logits), tokens, engine.traces, model, path)


@pytest.fixture(scope="module")
def demo_f32(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with its quantised weights written out as f32."""
    return write_f32_copy(demo_model, tmp_path_factory.mktemp("demo") / "demo-f32.gguf")


@pytest.fixture(scope="module")
def demo_tokens(demo_f32: Path) -> tuple[list[int], int]:
    """A sample problem and 200 tokens of its chain of thought; the prompt's length."""
    from py_reasonalloc.task.problems import SAMPLE_PROBLEM

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


@pytest.mark.parametrize("kv", ["f32", "f16"])
def test_demo_logits_with_one_op_per_layer(demo_f32, demo_tokens, kv: str) -> None:
    tokens, n_prompt = demo_tokens
    run = run_engine(demo_f32, tokens, n_prompt, kv, True, {"attention": "layer"})
    logits, _ = run.model.forward(tokens, run.visible())
    assert np.abs(logits - run.engine_logits).max() < LOGIT_TOLERANCE["f16"] * (
        np.abs(logits).max() / 10
    )


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("n_prompt", [1, 16, 23, 90])
def test_random_model_logits_after_compressions(make_gguf, arch: str, n_prompt: int) -> None:
    """Other architectures, prompts read in pieces of several sizes, longer than the budget too."""
    path = make_gguf(arch=arch, n_head=6, n_head_kv=2, head_dim=64, n_ctx_train=1024)
    tokens = random_tokens(180, seed=n_prompt)
    run = run_engine(path, tokens, n_prompt, "f32", False, {})
    logits, _ = run.model.forward(tokens, run.visible())
    assert np.abs(logits - run.engine_logits).max() < LOGIT_TOLERANCE["f32"]


@pytest.mark.parametrize("kv,flash_attn", [("f32", False), ("f16", True)])
def test_two_sequences_side_by_side(make_gguf, kv: str, flash_attn: bool) -> None:
    """Prompts of other lengths in one batch, then a token of each per step."""
    path = make_gguf(arch="llama", n_head=6, n_head_kv=2, head_dim=64, n_ctx_train=1024)
    model = NumpyModel(path)
    tokens = [random_tokens(180, seed=1), random_tokens(163, seed=2)]
    prompts = [23, 6]
    config = {"buffer": 16, "head_alloc": "adaptive"}
    with Engine(path, 40, kv, flash_attn=flash_attn, config=config, n_seq_max=2) as engine:
        engine.trace()
        rows = [[r] for r in engine.decode_many([(i, tokens[i][: prompts[i]]) for i in range(2)])]
        for step in range(157):
            runs = [(i, [tokens[i][prompts[i] + step]]) for i in range(2)]
            for i, logits in enumerate(engine.decode_many(runs)):
                rows[i].append(logits)
        assert [engine.length(i) for i in range(2)] == [180, 163]
        for i in range(2):
            traces = [event for event in engine.traces if event.seq_id == i]
            assert len({event.n_pos for event in traces}) >= 5
            run = Run(np.concatenate(rows[i]), tokens[i], traces, model)
            logits, _ = model.forward(tokens[i], run.visible())
            tolerance = LOGIT_TOLERANCE["f32" if kv == "f32" else "f16"]
            assert np.abs(logits - run.engine_logits).max() < tolerance


class PolicyOracle:
    """Judges every compression of a run from NumPy's own queries and keys.

    Scores must agree within SCORE_TOLERANCE; budgets and kept sets must be exactly what the
    reference makes of the engine's scores.
    """

    N_WINDOW, N_SINK, SEED = 8, 4, 7

    def __init__(self, run: Run, policy: str, buffer: int) -> None:
        self.run = run
        self.policy = policy
        self.layers = run.replay()[1]
        self.n_judged = [0] * run.model.n_layer  # compressions
        self.n_ring = max(buffer, self.N_WINDOW)
        self.states: dict[tuple[int, int], dict[int, float]] = {}
        self.n_scored = [0] * run.model.n_layer
        self.n_compared = 0
        self.n_merged = 0
        self.tolerance = SCORE_TOLERANCE
        self.centres: np.ndarray | None = None

    def query_positions(self, event) -> np.ndarray:
        if self.policy in reference.ALL_QUERIES:
            first = max(self.n_scored[event.il], event.n_pos - self.n_ring)
            return np.arange(first, event.n_pos)
        return np.arange(event.n_pos - self.N_WINDOW, event.n_pos)

    def judge(self, event) -> None:
        queries = self.query_positions(event)
        for ih in range(self.run.model.n_head_kv):
            self.judge_scores(event, ih, queries)
        self.n_scored[event.il] = event.n_pos
        self.n_judged[event.il] += 1
        for ih, scores in enumerate(event.scores):
            expected = reference.select_keep(scores, event.budgets[ih])
            assert np.array_equal(expected, event.keep[ih])

    def judge_scores(self, event, ih: int, queries: np.ndarray) -> None:
        act, pos = self.layers[event.il], event.positions[ih]
        n_group = self.run.model.n_head // self.run.model.n_head_kv
        before = self.states.get((event.il, ih), {})
        n_state = reference.N_STATE.get(self.policy, 1)
        nothing = np.nan if n_state == 1 else [np.nan] * n_state
        head = reference.Head(
            k=act.k[ih][pos],
            q=act.q[ih * n_group : (ih + 1) * n_group][:, queries].transpose(1, 0, 2),
            kq_scale=self.run.model.kq_scale,
            pos=pos,
            obs_pos=queries,
            v=act.v[self.n_judged[event.il]][ih][pos],
            bias=act.bias[self.n_judged[event.il]][ih][pos],
            n_state=n_state,
            state=np.array([before.get(int(p), nothing) for p in pos]),
            n_window=self.N_WINDOW,
            il=event.il,
            ih=ih,
            seed=self.SEED,
            rope=self.rope(),
            centres=self.centres_of(event.il, ih, n_group),
        )
        scores = reference.POLICIES[self.policy](head)
        state = reference.policy_state(self.policy, head, scores)
        self.states[event.il, ih] = dict(zip(pos.tolist(), state.tolist()))
        if event.target is not None:
            self.judge_merge(event, ih, head)
        expected = reference.forced_scores(scores, pos, self.N_SINK, self.N_WINDOW, 0)
        got, free = event.scores[ih], np.isfinite(expected)
        assert np.array_equal(np.isposinf(got), np.isposinf(expected))
        scale = max(1.0, np.abs(expected[free]).max(initial=0.0))
        if self.policy == "streaming":  # ranks
            assert np.array_equal(got[free], expected[free])
        tolerance = scale * self.tolerance
        if self.policy in reference.ALL_QUERIES:  # kept in q8_0
            tolerance = 0.25 * np.abs(expected[free]).max(initial=0.0)
        assert np.abs(got[free] - expected[free]).max(initial=0.0) < tolerance
        self.n_compared += int(free.sum())

    def rope(self) -> reference.Rope:
        """As `NumpyModel` rotates."""
        model, half = self.run.model, self.run.model.head_dim // 2
        freq = model.rope_base ** (-np.arange(half) / half)
        return reference.Rope(model.head_dim, 0, model.arch != "llama", freq)

    def centres_of(self, il: int, ih: int, n_group: int) -> np.ndarray:
        """Those that `Engine` takes where it is given none."""
        if self.centres is None:
            with Engine(self.run.path) as engine:
                self.centres = random_centres(engine.model).astype(np.float64)
        return self.centres[il, ih * n_group : (ih + 1) * n_group]

    def judge_merge(self, event, ih: int, head: reference.Head) -> None:
        """Targets, shares and biases; where keys are nearly as alike, either target is right."""
        keep = event.keep[ih]
        can_take = keep & np.isfinite(event.scores[ih])
        masses = reference.mass_of(self.policy, head)
        target, share, bias, _ = reference.merge(head, keep, can_take, masses)
        got = event.target[ih]
        unit = reference.unit_keys(head.k)
        differ = np.flatnonzero(got != target)
        for j in differ:
            assert abs(unit[j] @ unit[got[j]] - unit[j] @ unit[target[j]]) < 1e-5
        touched = np.isin(np.arange(head.n_kv), [*got[differ], *target[differ]])
        same = ~touched & ~np.isin(got, np.flatnonzero(touched))
        is_coarse = self.policy in reference.ALL_QUERIES  # queries in q8_0
        tolerance = 0.05 if is_coarse else SCORE_TOLERANCE
        assert np.abs(event.share[ih] - share)[same].max(initial=0.0) < tolerance
        error = np.abs(event.bias[ih] - bias)[same & keep]
        # a logarithm of a ratio: of tokens that hardly receive anything it may be anything
        sure = (masses > 1e-5)[same & keep]
        assert error[sure].max(initial=0.0) < (0.25 if is_coarse else 0.05)
        self.n_merged += int((got >= 0).sum())


@pytest.mark.parametrize("policy", list(reference.POLICIES))
def test_policy_on_real_queries_and_keys(demo_f32, demo_tokens, policy: str) -> None:
    """Scores of the engine equal the reference's; its kept sets are the reference's choice."""
    tokens, n_prompt = demo_tokens
    config = {"policy": policy, "seed": PolicyOracle.SEED}
    run = run_engine(demo_f32, tokens, n_prompt, "f32", False, config)
    oracle = PolicyOracle(run, policy, 16)
    for event in run.traces:
        oracle.judge(event)
    assert oracle.n_compared > 1000


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv,tolerance", [("f32", SCORE_TOLERANCE), ("q8_0", 0.1), ("q4_0", 0.8)])
def test_distance_preferences_of_other_models(make_gguf, arch: str, kv: str, tolerance) -> None:
    """Both orders of pairs, and rows that a quantised cache rotates once more to store them."""
    path = make_gguf(arch=arch, n_head=6, n_head_kv=2, head_dim=64, n_ctx_train=1024)
    tokens = random_tokens(180, seed=1)
    run = run_engine(path, tokens, 23, kv, kv != "f32", {"policy": "triattention"})
    oracle = PolicyOracle(run, "triattention", 16)
    oracle.tolerance = tolerance
    for event in run.traces:
        if (
            kv == "f32" or event.i_compression == 0
        ):  # later keys come from other kept rows' attention
            oracle.judge(event)
    assert oracle.n_compared > (1000 if kv == "f32" else 50)


@pytest.mark.parametrize("policy", ["loss", "mass", "rkv", "streaming"])
@pytest.mark.parametrize("kv,flash_attn", [("f32", False), ("f16", True)])
def test_merging_on_real_queries_and_keys(
    demo_f32, demo_tokens, policy: str, kv: str, flash_attn: bool
) -> None:
    """Evicted tokens are merged: targets, shares, biases, and the logits of what follows."""
    tokens, n_prompt = demo_tokens
    config = {"policy": policy, "seed": PolicyOracle.SEED, "merge": 1}
    run = run_engine(demo_f32, tokens, n_prompt, kv, flash_attn, config)
    logits, _ = run.replay()
    tolerance = LOGIT_TOLERANCE["f32" if kv == "f32" else "f16"]
    assert np.abs(logits - run.engine_logits).max() < tolerance * np.abs(logits).max() / 10
    # the oracle can tell: dropped tokens give something else
    dropped, _ = run.model.forward(tokens, run.visible())
    assert np.abs(dropped - run.engine_logits).max() > 10 * tolerance
    if kv == "f32":
        oracle = PolicyOracle(run, policy, 16)
        for event in run.traces:
            oracle.judge(event)
        assert oracle.n_merged > 1000


@pytest.mark.parametrize("index", range(20))
def test_adaptive_heads_on_demo_problems(demo_f32, index: int) -> None:
    """ReasonAlloc's heads on 20 problems: budgets and kept sets of every compression."""
    from py_reasonalloc.task.problems import generate_problem

    buffer, budget = 16, 40
    config = {"policy": "rkv", "head_alloc": "adaptive", "buffer": buffer}
    with Engine(demo_f32, budget, "f32", flash_attn=False, config=config) as engine:
        prompt = demo_prompt(engine, generate_problem(seed=11, index=index, level=1))
        engine.trace()
        logits = [engine.decode(prompt)]
        tokens = list(prompt)
        for _ in range(100):
            tokens.append(int(np.argmax(logits[-1][-1])))
            logits.append(engine.decode(tokens[-1:]))
        run = Run(np.concatenate(logits), tokens, engine.traces, NumpyModel(demo_f32), demo_f32)
    oracle = PolicyOracle(run, "rkv", buffer)
    n_head_kv = run.model.n_head_kv
    changed = False
    for event in run.traces:
        oracle.judge(event)
        budgets, total = np.array(event.budgets), budget * n_head_kv
        rest = total - 12 * len(event.scores)
        least = max(int(0.25 * rest / len(event.scores)), 1)
        demand = reference_alloc.head_demand(reference_alloc.comparable(event.scores), rest)
        x, cap = reference_alloc.over_base(demand, total, 12, least)
        reference_alloc.check_rounding(budgets, x, total, 12 + least, cap)
        changed = changed or len(set(event.budgets)) > 1
    assert changed
    logits, _ = run.model.forward(tokens, run.visible())
    assert np.abs(logits - run.engine_logits).max() < 5 * LOGIT_TOLERANCE["f32"]
