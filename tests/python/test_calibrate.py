"""Calibration: the measured demand against NumPy, determinism, the command, big models' shapes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
from conftest import ROOT, TIMEOUT
from numpy_model import NumpyModel

from py_reasonalloc import BudgetConfig, ConfigError, ReasonLlama, UnsupportedError
from py_reasonalloc.engine.errors import ContextFullError
from py_reasonalloc.engine.identity import read_identity
from py_reasonalloc.profile.files import load_profile
from py_reasonalloc.profile.lookup import cached_path
from py_reasonalloc.run.calibrate import Settings, calibrate
from py_reasonalloc.run.demand import tokens_for_mass
from py_reasonalloc.session.generate import Generation, Sampling

GREEDY = Settings(steps=40, sampling=Sampling(temp=0.0), kv_type="f32", n_threads=1)

#: As published: layers, query heads, KV heads of the models that the paper calibrates.
SHAPES = {
    "DeepSeek-R1-Distill-Llama-8B": ("llama", 32, 32, 8),
    "DeepSeek-R1-Distill-Qwen-14B": ("qwen2", 48, 40, 8),
    "AceReason-Nemotron-14B": ("qwen2", 48, 40, 8),
}


pytestmark = pytest.mark.usefixtures("cache")


def test_tokens_for_mass() -> None:
    attention = np.array([[0.1, 0.6, 0.0, 0.3], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])
    assert tokens_for_mass(attention, 0.6).tolist() == [1, 3, 1]
    assert tokens_for_mass(attention, 0.85).tolist() == [2, 4, 1]
    assert tokens_for_mass(attention, 1.0).tolist() == [3, 4, 1]
    assert tokens_for_mass(4 * attention, 0.85).tolist() == [2, 4, 1]


def numpy_demand(path, prompt: list[int], generated: list[int], rho: float) -> np.ndarray:
    """Sums over decode steps of the mean demand, [n_layer], and the number of steps."""
    model = NumpyModel(path)
    tokens = prompt + generated[:-1]  # the last one is never decoded
    demand = []
    for layer in model.forward(tokens)[1]:
        k = np.repeat(layer.k, model.n_head // model.n_head_kv, axis=0)
        counts = []
        for t in range(len(prompt), len(tokens)):
            logits = np.einsum("hd,hjd->hj", layer.q[:, t], k[:, : t + 1]) * model.kq_scale
            for row in logits:
                weights = sorted(np.exp(row - row.max()) / np.exp(row - row.max()).sum())
                mass, n = 0.0, 0
                while mass < rho:
                    mass, n = mass + weights.pop(), n + 1
                counts.append(n)
        demand.append(np.mean(counts))
    return np.array(demand)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_measurement_is_numpys(make_gguf, arch) -> None:
    path = make_gguf(arch=arch, n_layer=3)
    prompt = "how many primes?"
    found = calibrate(path, [prompt], GREEDY)
    with ReasonLlama(path, None, n_ctx=256, type_k="f32", type_v="f32", n_threads=1) as llama:
        generation = Generation(llama, llama.tokenize(prompt.encode()), 40, Sampling(temp=0.0))
        assert len(list(generation)) > 0
    expected = numpy_demand(path, generation.prompt, generation.tokens, GREEDY.rho)
    assert found.n_steps == len(generation.tokens) - 1 == 39
    assert expected.max() > 5  # there is something to measure
    assert np.allclose(found.demand, expected, atol=0.02), (found.demand, expected)


def numpy_horizons(path, prompt: list[int], generated: list[int], horizon: int) -> np.ndarray:
    """Mean tokens of the chain that cover rho of a horizon's attention on them, [n_layer]."""
    model = NumpyModel(path)
    tokens = prompt + generated[:-1]
    n_prompt, n_group = len(prompt), model.n_head // model.n_head_kv
    demand = []
    for layer in model.forward(tokens)[1]:
        counts = []
        for begin in range(n_prompt + horizon, len(tokens), horizon):
            steps = range(begin, min(begin + horizon, len(tokens)))
            if 2 * len(steps) < horizon:
                continue
            for ih in range(model.n_head_kv):
                mass: dict[int, float] = {}
                for t in steps:
                    for g in range(n_group):
                        row = layer.k[ih, : t + 1] @ layer.q[ih * n_group + g, t] * model.kq_scale
                        weights = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
                        for j in range(n_prompt, begin - 8):
                            mass[j] = mass.get(j, 0.0) + weights[j]
                left, n = sorted(mass.values()), 0
                covered = 0.0
                while covered < GREEDY.rho * sum(mass.values()):
                    covered, n = covered + left.pop(), n + 1
                counts.append(n)
        demand.append(np.mean(counts))
    return np.array(demand)


def test_horizons_are_numpys(make_gguf) -> None:
    path = make_gguf(arch="qwen2", n_layer=3)
    prompts = ["how many primes?", "why?"]
    settings = dataclasses.replace(GREEDY, steps=60, horizon=16)
    found = calibrate(path, prompts, settings)
    assert found.horizon == 16 and found.n_steps == 2 * 59
    demands = []
    with ReasonLlama(path, None, n_ctx=256, type_k="f32", type_v="f32", n_threads=1) as llama:
        for prompt in prompts:
            generation = Generation(llama, llama.tokenize(prompt.encode()), 60, Sampling(temp=0.0))
            assert len(list(generation)) > 0 and len(generation.tokens) == 60
            demands.append(numpy_horizons(path, generation.prompt, generation.tokens, 16))
    # horizons of 16, 16 and 11 steps in each text
    expected = (demands[0] + demands[1]) / 2
    assert expected.max() > 5
    assert np.allclose(found.demand, expected, atol=0.2), (found.demand, expected)


def test_prompts_add_up(make_gguf) -> None:
    path = make_gguf()
    both = calibrate(path, ["how many?", "why?"], GREEDY)
    one, two = (calibrate(path, [prompt], GREEDY) for prompt in ("how many?", "why?"))
    assert both.n_steps == one.n_steps + two.n_steps
    mean = (np.array(one.demand) + np.array(two.demand)) / 2
    assert np.allclose(both.demand, mean, atol=1e-3)


def test_one_seed_one_profile(make_gguf) -> None:
    def measured(seed: int):
        settings = Settings(steps=30, sampling=Sampling(temp=1.0, seed=seed), n_threads=1)
        return calibrate(make_gguf(), ["how many?", "why?"], settings)

    assert measured(3) == measured(3)
    assert measured(3).demand != measured(9).demand


def test_progress_reaches_the_end(make_gguf) -> None:
    steps: list[int] = []
    path = make_gguf(n_ctx_train=64)  # the context ends before the steps do
    for curves in (True, False):
        steps.clear()
        settings = Settings(steps=100, curves=curves)
        calibrate(path, ["how many?", "why?"], settings, progress=steps.append, texts=["so" * 9])
        assert sum(steps) == settings.work(2, 1) == (500 if curves else 200)


def test_layers_without_attention_have_no_demand(make_gguf) -> None:
    path = make_gguf(arch="deci", n_layer=3, n_head_kv=(4, 0, 1))
    found = calibrate(path, ["why?"], Settings(steps=10))
    assert found.demand[1] == 0 and min(found.demand[0], found.demand[2]) > 0
    assert found.n_head_kv == (4, 0, 1)
    with ReasonLlama(path, budget=48, profile=found) as llama:
        llama.eval(llama.tokenize(b"hello" * 40))


def test_what_is_refused(make_gguf) -> None:
    with pytest.raises(ConfigError, match="0 prompts: must be 1 to 8"):
        calibrate(make_gguf(), [])
    with pytest.raises(ConfigError, match="the prompt is empty"):
        calibrate(make_gguf(), [" "])
    with pytest.raises(ContextFullError, match="a probe prompt has 101 tokens"):
        calibrate(make_gguf(n_ctx_train=64), ["x" * 100])
    with pytest.raises(UnsupportedError, match="architecture 'mamba' is not supported"):
        calibrate(make_gguf(arch="mamba"), ["why?"])
    with pytest.raises(UnsupportedError, match="nothing was measured"):
        calibrate(make_gguf(), ["why?"], Settings(steps=1))


def test_texts_that_are_too_short_for_a_horizon(make_gguf, tmp_path) -> None:
    """By their steps, by the context, by the model's own end: each error says what would do."""
    drawn = dataclasses.replace(GREEDY, steps=25, sampling=Sampling(temp=1.5), curves=False)
    with pytest.raises(ConfigError, match="steps = 24 is too few for a horizon of 16"):
        dataclasses.replace(drawn, steps=24, horizon=16)
    fits = dataclasses.replace(drawn, horizon=16)
    assert min(calibrate(make_gguf(), ["why?"], fits).demand) > 0
    with pytest.raises(ContextFullError, match=r"of 25 tokens, .* ends at 40, 15 after"):
        calibrate(make_gguf(n_ctx_train=40), ["x" * 24], fits)

    path = tmp_path / "ends.gguf"
    shutil.copy(make_gguf(), path)
    with ReasonLlama(path, n_ctx=256, n_threads=1, type_k="f32", type_v="f32") as llama:
        prompt = llama.tokenize(b"why?")
        generation = Generation(llama, prompt, 25, drawn.sampling)
        list(generation)
    tokens = generation.tokens
    n_text = next(i for i in range(15, 25) if tokens[i] not in tokens[:i])
    field = gguf.GGUFReader(path, "r+").fields["tokenizer.ggml.eos_token_id"]
    field.parts[-1][0] = tokens[n_text]
    with pytest.raises(UnsupportedError, match=r"of 25 tokens, .* after (\d+) \(--horizon") as told:
        calibrate(path, ["why?"], fits)
    n_told, horizon = map(int, re.findall(r"after (\d+) \(--horizon (\d+)", str(told.value))[0])
    assert n_told == n_text + 1  # with the end token
    assert min(calibrate(path, ["why?"], dataclasses.replace(drawn, horizon=horizon)).demand) > 0


def test_command(demo_model, tmp_path) -> None:
    def measure(name: str, *more):
        command = [sys.executable, "-m", "py_reasonalloc.commands.profile", "demo", "-o"]
        arguments = [tmp_path / name, "--steps", 24, "--threads", 1, *more]
        return subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=TIMEOUT,
            cwd=ROOT,
            check=False,
        )

    done = measure("a.json", "--cache")
    assert done.returncode == 0, done.stderr
    assert "measuring 8 chains of thought" in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + 6 and "█" in done.stdout
    a = load_profile(tmp_path / "a.json")
    assert (a.name, a.n_layer, a.n_prompts, a.n_steps) == ("a", 6, 8, 8 * 23)
    assert a.fingerprint == read_identity(demo_model).fingerprint
    assert str(tmp_path) not in (tmp_path / "a.json").read_text()
    assert load_profile(cached_path(read_identity(demo_model))) == a
    assert measure("b.json").returncode == 0
    assert load_profile(tmp_path / "b.json").demand == a.demand


def test_run_calibrates(cli, make_gguf) -> None:
    path = make_gguf()
    arguments = (path, "-p", "hello", "-n", 4, "--budget", 64, "--threads", 1, "--json")
    done = cli(*arguments, "--profile", "calibrate")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "measuring 4 chains of thought"
    cached = str(cached_path(read_identity(path)))
    assert json.loads(done.stdout)["profile"] == cached
    assert json.loads(cli(*arguments).stdout)["profile"] == cached
    assert load_profile(cached).command == f"reasonalloc-run {path.name} --profile calibrate"


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_the_papers_models(cli, make_gguf, name, tmp_path) -> None:
    """Random weights, small widths; layers and heads exactly as published."""
    arch, n_layer, n_head, n_head_kv = SHAPES[name]
    path = make_gguf(
        arch=arch, n_layer=n_layer, n_head=n_head, n_head_kv=n_head_kv, head_dim=32, n_ff=256,
        weight_type="q8_0",
    )  # fmt: skip
    profile = calibrate(path, ["how many primes?", "why?"], Settings(steps=24, n_threads=1))
    assert (profile.n_layer, profile.n_head_kv) == (n_layer, n_head_kv)
    assert min(profile.demand) >= 1
    config = BudgetConfig(budget=48, buffer=16, layers="wave", heads="adaptive", profile=profile)
    with ReasonLlama(path, config, n_threads=1) as llama:
        llama.eval(llama.tokenize(b"How many primes are there below one hundred?"))
        done = llama("How many primes?", max_tokens=80, temperature=0.0)
        assert done["usage"]["completion_tokens"] == 80
        stats = llama.kv_stats()
    assert stats.n_compressions > 0
    assert sum(head.budget for layer in stats.layers for head in layer) == 48 * n_layer * n_head_kv
    assert len({layer[0].capacity for layer in stats.layers}) > 1
    profile.save(tmp_path / "p.json")
    done = cli(path, "-p", "why?", "-n", 8, "--budget", 48, "--profile", tmp_path / "p.json")
    assert done.returncode == 0 and "wave by profile" in done.stderr
