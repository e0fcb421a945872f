"""Error curves: what is recorded and replayed against NumPy, and budgets by them in the engine."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from numpy_model import NumpyModel
from reference import Head, forced_scores, loss, mass_of, mass_state, merge, select_keep

from py_reasonalloc import BudgetConfig, BudgetError, ConfigError, ContextError, ReasonLlama
from py_reasonalloc.commands import profile as profile_cli
from py_reasonalloc.commands.run import main
from py_reasonalloc.commands.run import run as run_cli
from py_reasonalloc.commands.run_request import run_options
from py_reasonalloc.engine.identity import read_identity
from py_reasonalloc.profile.files import load_profile
from py_reasonalloc.profile.head_error import HeadError
from py_reasonalloc.profile.lookup import cached_path, find_profile, save_to_cache
from py_reasonalloc.run.allocation import settle
from py_reasonalloc.run.calibrate import Settings, calibrate
from py_reasonalloc.run.curves import GRID, CurveMeter, HeadReplay, replay_config
from py_reasonalloc.run.options import plan_run
from py_reasonalloc.session.generate import Generation, Sampling
from py_reasonalloc.session.profiled import head_budgets

BUFFER = 16
TEXT = "The sum of two odd numbers is even, and so is that of two even ones; of three odd ones not."


pytestmark = pytest.mark.usefixtures("cache")


def reference_error(q, k, v, scale: float, budget: int) -> float:
    """One head's stream at one budget, in float64, with the policies' NumPy definitions."""
    n_tokens, n_group = q.shape[:2]
    full = np.zeros((n_tokens, n_group, v.shape[1]))
    for t in range(n_tokens):
        logits = scale * q[t] @ k[: t + 1].T
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        full[t] = weights / weights.sum(axis=1, keepdims=True) @ v[: t + 1]
    pos, values = np.zeros(0, int), v.copy()
    bias, state = np.zeros(n_tokens), np.full((n_tokens, 2), np.nan)
    error, begin = 0.0, 0
    for end in [*range(2 * BUFFER, n_tokens, BUFFER), n_tokens]:
        pos = np.concatenate([pos, np.arange(begin, end)])
        for t in range(begin, end):
            seen = pos[pos <= t]
            logits = scale * q[t] @ k[seen].T + bias[seen]
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            output = weights / weights.sum(axis=1, keepdims=True) @ values[seen]
            error += float(np.square(output - full[t]).sum())
        if end < n_tokens:
            head = Head(
                k=k[pos], q=q[end - BUFFER : end], kq_scale=scale, pos=pos, n_window=16,
                v=values[pos], bias=bias[pos], n_state=2, state=state[pos],
            )  # fmt: skip
            score, mass = forced_scores(loss(head), pos, 4, 16, 0), mass_of("loss", head)
            state[pos] = mass_state(head)
            if budget < len(pos):
                keep = select_keep(score, budget)
                _, _, bias[pos], values[pos] = merge(head, keep, keep & np.isfinite(score), mass)
                pos = pos[keep]
        begin = end
    return error


def random_stream(seed: int, n_tokens: int, n_group: int = 2, dim: int = 8, dim_v: int = 12):
    random = np.random.default_rng(seed)
    drift = np.cumsum(random.normal(size=(n_tokens, dim)), axis=0) / 4  # keys that come again
    k = drift + random.normal(size=(n_tokens, dim))
    q = 2 * drift[:, None] + random.normal(size=(n_tokens, n_group, dim))
    v = random.normal(size=(n_tokens, dim_v))
    return tuple(x.astype(np.float32) for x in (q, k, v))


@pytest.mark.parametrize("seed", range(4))
def test_replay_is_numpys(seed) -> None:
    q, k, v = random_stream(seed, n_tokens=107)
    grid = (20, 24, 40, 64, 95, 96, 200)
    found = HeadReplay(replay_config(BUFFER), q, k, v, 0.35).errors(grid)
    wide = (x.astype(np.float64) for x in (q, k, v))
    q, k, v = wide
    expected = [reference_error(q, k, v, 0.35, budget) for budget in grid]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found[0] > found[3] > 0 == found[-1] == found[-2]  # 96 tokens at the last compression


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_measurement_is_numpys(make_gguf, arch) -> None:
    """From the model file to the curves: chains of thought and a text."""
    path = make_gguf(arch=arch, n_layer=3)
    settings = Settings(
        steps=60, sampling=Sampling(temp=0.0), kv_type="f32", n_threads=1, buffer=BUFFER
    )
    prompt = "how many primes?"
    found = calibrate(path, [prompt], settings, texts=[TEXT]).head_error
    assert found is not None
    assert (found.base, found.buffer, found.policy, found.merge) == (20, BUFFER, "loss", True)
    model = NumpyModel(path)
    with ReasonLlama(path, None, n_ctx=256, type_k="f32", type_v="f32", n_threads=1) as llama:
        generation = Generation(llama, llama.tokenize(prompt.encode()), 60, Sampling(temp=0.0))
        assert len(list(generation)) > 0
        texts = [generation.prompt + generation.tokens[:-1], llama.tokenize(TEXT.encode())]
    n_group = model.n_head // model.n_head_kv
    expected = np.zeros((3, model.n_head_kv, len(found.grid)))
    norms, n_norms = np.zeros(3), 0
    for tokens in texts:
        layers = model.forward(tokens)[1]
        for il, layer in enumerate(layers):
            norms[il] += np.square(layer.x[4:]).sum()
            for ih in range(model.n_head_kv):
                q = layer.q[ih * n_group : (ih + 1) * n_group].transpose(1, 0, 2)
                errors = [
                    reference_error(q, layer.k[ih], layer.v[0][ih], model.kq_scale, budget)
                    for budget in found.grid
                ]
                expected[il, ih] += errors
        n_norms += len(tokens) - 4
    # of the last block the graph has no more than the outputs
    weights = 1 / (norms / n_norms)
    expected *= weights[:, None, None]
    values = np.array(found.values).reshape(expected.shape)
    # near ties may fall the other way with weights in other precision
    deviation = np.abs(values / expected - 1)[:-1]
    assert np.quantile(deviation, 0.75) < 0.01 and deviation.max() < 0.3
    ratio = values[-1] / expected[-1]
    assert ratio == pytest.approx(np.median(ratio), rel=0.3) and 0.5 < np.median(ratio) < 2
    assert found.grid == GRID[: len(found.grid)]
    n_longest = max(map(len, texts))
    assert found.grid[-1] < n_longest - BUFFER // 2 <= GRID[len(found.grid)] + BUFFER


def test_one_seed_one_curve(make_gguf) -> None:
    """Also with several heads at a time."""

    def measured(seed: int):
        settings = Settings(
            steps=60, sampling=Sampling(temp=1.0, seed=seed), n_threads=1, buffer=BUFFER
        )
        return calibrate(make_gguf(), ["how many?"], settings).head_error

    assert measured(3) == measured(3) != measured(9)
    q, k, v = random_stream(1, n_tokens=100)
    from py_reasonalloc.run.streams import Stream

    streams = [Stream(np.stack([q] * 3), np.stack([k, 2 * k, k]), np.stack([v] * 3), 0.35)]
    meters = [CurveMeter([3], replay_config(BUFFER), n_threads) for n_threads in (1, 3)]
    done: list[int] = []
    for meter in meters:
        meter.add(streams, done.append)
    assert done == [1] * 6
    curves = [meter.head_error(np.ones(1)) for meter in meters]
    assert curves[0] == curves[1] and curves[0].values[0] == curves[0].values[2]
    assert curves[0].values[0] != curves[0].values[1]


def test_short_texts_have_no_curves(make_gguf) -> None:
    profile = calibrate(make_gguf(), ["why?"], Settings(steps=30, n_threads=1))
    assert profile.head_error is None and max(profile.demand) > 0


def test_texts_do_not_change_the_demand(make_gguf) -> None:
    settings = Settings(steps=30, sampling=Sampling(temp=0.0), n_threads=1, buffer=BUFFER)
    plain = calibrate(make_gguf(), ["why?"], settings)
    longer = calibrate(make_gguf(), ["why?"], settings, texts=[TEXT, "x"])
    assert longer.demand == plain.demand and longer.n_steps == plain.n_steps
    assert plain.head_error is None and longer.head_error is not None


# --- budgets by curves ----------------------------------------------------------------------------


@pytest.fixture
def profile(make_gguf):
    """Of the small model, with curves that make head 1 of layer 1 want the most."""
    path = make_gguf(n_layer=2)
    plain = calibrate(path, ["why?"], Settings(steps=30, n_threads=1, curves=False))
    assert plain.n_head_kv == 2 and plain.head_error is None
    values = ((4.0, 1e-3, 1e-4), (5.0, 0.5, 0.3), (6.0, 1e-2, 1e-3), (9.0, 8.0, 0.2))
    curves = HeadError((20, 40, 100), 20, BUFFER, "loss", True, values)
    return dataclasses.replace(plain, head_error=curves)


@pytest.mark.parametrize("n_protect", [0, 30])
def test_the_engine_takes_the_budgets(make_gguf, profile, n_protect) -> None:
    config = BudgetConfig(
        budget=64, buffer=BUFFER, window=16, policy="loss", merge=True, layers="error",
        protect_prompt=n_protect or "off", profile=profile,
    )  # fmt: skip
    budgets = head_budgets(config, profile.n_head_kv, profile.n_layer)
    assert sum(map(sum, budgets)) == 4 * 64
    assert budgets[1][1] == max(map(max, budgets)) > 64 > budgets[0][0]
    base = max(n_protect, 4) + 16
    assert min(map(min, budgets)) >= base + int(0.4 * (64 - base))
    with ReasonLlama(make_gguf(n_layer=2), config, n_threads=1) as llama:
        done = llama("x" * 40, max_tokens=100, temperature=0.0)
        assert done["usage"]["completion_tokens"] == 100
        stats = llama.kv_stats()
    assert stats.n_compressions > 0 and stats.n_evicted > 0
    assert [[head.budget for head in layer] for layer in stats.layers] == budgets
    assert [[head.capacity - BUFFER for head in layer] for layer in stats.layers] == budgets


def test_protected_tokens_shift_the_curves(profile) -> None:
    """What is protected beyond the sinks is added to every head: the rest is split as before."""
    config = BudgetConfig(
        budget=64, buffer=BUFFER, window=16, policy="loss", layers="error", profile=profile
    )
    plain = head_budgets(config, 2, 2)
    longer = dataclasses.replace(config, budget=64 + 26, protect_prompt=30)
    assert head_budgets(longer, 2, 2) == [[n + 26 for n in row] for row in plain]


def test_what_is_refused(make_gguf, profile, tmp_path) -> None:
    path = make_gguf(n_layer=2)
    without = dataclasses.replace(profile, head_error=None)
    with pytest.raises(ConfigError, match="layers = 'error' needs a profile: pass one"):
        BudgetConfig(layers="error")
    with pytest.raises(ConfigError, match="needs a profile with error curves, .* has none: measur"):
        BudgetConfig(layers="error", profile=without)
    with pytest.raises(BudgetError, match="budget 30 is too small"):
        BudgetConfig(budget=30, window=26, layers="error", profile=profile)
    with pytest.raises(ConfigError, match="buffer = 0 is out of range"):
        Settings(buffer=0)
    other = make_gguf(n_layer=2, n_head_kv=1)
    config = BudgetConfig(layers="error", profile=profile)
    with pytest.raises(ContextError, match="needs a curve of 3 points for each of the 2 KV heads"):
        ReasonLlama(other, config)
    assert find_profile(path, with_curves=True) is None
    save_to_cache(without, read_identity(path))
    assert find_profile(path) == without and find_profile(path, with_curves=True) is None
    with pytest.raises(ConfigError, match="layers = 'error' needs a profile: pass one"):
        ReasonLlama(path, budget=64, layers="error", profile="auto")
    save_to_cache(profile, read_identity(path))
    assert find_profile(path, with_curves=True) == profile


def test_sessions_take_a_profile_with_curves(make_gguf, profile) -> None:
    path = make_gguf(n_layer=2)
    save_to_cache(profile, read_identity(path))
    with ReasonLlama(path, budget=64, layers="error", profile="auto") as llama:
        assert llama.config.heads == "uniform" and llama.config.profile == profile
        assert len({head.budget for layer in llama.kv_stats().layers for head in layer}) > 2


@pytest.mark.parametrize(
    ("given", "layers", "policy", "is_merged"),
    [
        ({}, "uniform", "rkv", False),
        ({"profile": "auto"}, "error", "loss", True),
        ({"profile": "auto", "policy": "rkv"}, "error", "rkv", False),
        ({"profile": "auto", "layers": "wave"}, "wave", "rkv", False),
        ({"layers": "pyramid"}, "pyramid", "rkv", False),
        ({"policy": "loss"}, "uniform", "loss", True),
    ],
)
def test_the_policy_goes_with_the_budgets_of_a_session(
    make_gguf, profile, given, layers, policy, is_merged
) -> None:
    """Unless one is asked for."""
    path = make_gguf(n_layer=2)
    save_to_cache(profile, read_identity(path))
    with ReasonLlama(path, budget=64, buffer=BUFFER, **given) as llama:
        llama.reconfigure(llama.config)  # resolved: the same again
        config = llama.config
    assert (config.layers, config.policy, config.merge) == (layers, policy, is_merged)
    native = config.to_native()
    assert (native.policy.decode(), native.merge) == (policy, is_merged)


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "layers", "policy", "is_merged"),
    [
        ([], "error", "loss", True),
        (["--set", "merge=0"], "error", "loss", False),
        (["--policy", "snapkv"], "error", "snapkv", False),
        (["--layers", "wave"], "wave", "rkv", False),
        (["--layers", "uniform"], "uniform", "rkv", False),
        (["--profile", "none"], "uniform", "rkv", False),
        (["--profile", "none", "--set", "merge=1"], "uniform", "rkv", True),
        (["--profile", "none", "--policy", "loss"], "uniform", "loss", True),
        (["--method", "paper"], "wave", "rkv", False),
    ],
)
def test_the_policy_goes_with_the_budgets_of_a_run(
    make_gguf, profile, given, layers, policy, is_merged
) -> None:
    path = make_gguf(n_layer=2)
    save_to_cache(profile, read_identity(path))
    arguments = [str(path), "-p", "x" * 40, "--budget", "64", "--protect-prompt", "all", *given]
    parsed = main.make_context("reasonalloc-run", arguments).params
    options = run_options(parsed, is_demo=False)
    config = settle(options, plan_run(options, "x" * 40)).config
    assert config is not None and (config.layers, config.policy) == (layers, policy)
    assert config.merge == is_merged


def test_run(in_process, make_gguf, profile, tmp_path) -> None:
    path, file = make_gguf(n_layer=2), tmp_path / "p.json"
    arguments = [path, "-p", "x" * 40, "-n", 60, "--budget", 64, "--buffer", 16, "--threads", 1]
    arguments += ["--protect-prompt", "off", "--policy", "loss", "--set", "merge=1"]
    arguments += ["--layers", "error"]
    code, _, err = in_process(run_cli, *arguments)
    assert code == 2 and "needs a profile with error curves, and none fits" in err
    code, _, err = in_process(run_cli, *arguments, "--profile", "none")
    assert code == 2 and "--layers error and --profile none exclude each other" in err
    dataclasses.replace(profile, head_error=None).save(file)
    code, _, err = in_process(run_cli, *arguments, "--profile", file)
    assert code == 2 and f"{file} has none" in err, err
    profile.save(file)
    arguments += ["--profile", file, "--json"]
    code, out, err = in_process(run_cli, *arguments)
    assert code == 0, err
    done = json.loads(out)
    assert (done["layers"], done["heads"], done["profile"]) == ("error", "uniform", str(file))
    code, out, err = in_process(run_cli, *arguments, "--dry-run")
    assert code == 0, err
    # K and V of budget + buffer tokens in all heads, f16: the split does not change the sum
    bytes_of_a_row = 2 * 2 * read_identity(path).head_dim
    assert json.loads(out)["kv_bytes"] == done["kv_bytes"] == 4 * (64 + 16) * bytes_of_a_row


def test_run_calibrates_curves(in_process, make_gguf, monkeypatch) -> None:
    path = make_gguf(n_ctx_train=260)
    arguments = [path, "-p", "hello", "-n", 4, "--budget", 64, "--buffer", 16, "--threads", 1]
    arguments += ["--layers", "error", "--profile", "calibrate", "--json"]
    code, out, err = in_process(run_cli, *arguments)
    assert code == 0, err
    cached = load_profile(cached_path(read_identity(path)))
    assert cached.head_error is not None and cached.head_error.buffer == 16
    assert json.loads(out)["layers"] == "error"


def test_profile_command(in_process, demo_model, tmp_path, monkeypatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    path = tmp_path / "p.json"
    measure = ["demo", "-o", path, "--threads", 1, "--seed", 2]
    code, out, err = in_process(profile_cli.run, *measure, "--steps", 8, "--no-curves")
    assert code == 0 and load_profile(path).head_error is None and "no error curves" not in err
    code, out, err = in_process(profile_cli.run, *measure, "--steps", 2)
    assert code == 0, err
    curves = load_profile(path).head_error
    assert curves is not None and curves.buffer == 16  # from the prompts
    code, out, err = in_process(profile_cli.run, *measure, "--steps", 2, "--buffer", 128)
    assert code == 0 and "no error curves: no text was longer than" in err
    code, out, err = in_process(
        profile_cli.run, *measure, "--steps", 2, "--text", text, "--buffer", 8
    )
    profile = load_profile(path)
    assert code == 0 and profile.command.endswith("--buffer=8 --text=text.txt")
    assert str(tmp_path) not in path.read_text()

    code, out, err = in_process(
        profile_cli.run, "--show", path, "--budget", 48, "--protect", 25, "--plot",
        tmp_path / "p.svg",
    )  # fmt: skip
    assert code == 0, err
    lines = out.splitlines()
    assert (
        "tokens of each KV head, by error curves, 48 on average, 25 of them protected" in lines[7]
    )
    budgets = [[int(n) for n in line.split()[1:]] for line in lines[8:]]
    assert [len(row) for row in budgets] == [4] * 6 and sum(map(sum, budgets)) == 24 * 48
    assert (tmp_path / "p.svg").stat().st_size > 1000
    code, _, err = in_process(profile_cli.run, "--show", path, "--budget", 20)
    assert code == 2 and "budget 20 is too small" in err
    for wrong, message in (
        (["demo", "--show", path], "--show takes a profile, no model and no -o"),
        ([*measure, "--text", text, "--no-curves"], "--text and --no-curves exclude each other"),
        ([*measure, "--text", tmp_path / "none"], "none: cannot be read: No such file"),
        ([*measure, "--buffer", 0], "buffer = 0 is out of range"),
    ):
        code, _, err = in_process(profile_cli.run, *wrong)
        assert code == 2 and message in err, err


def test_shipped_profiles_have_curves(demo_model, tmp_path) -> None:
    copy = tmp_path / "m.gguf"
    shutil.copy(demo_model, copy)
    found = find_profile(copy, with_curves=True)
    assert found is not None and found.head_error is not None and found.head_error.buffer == 16
