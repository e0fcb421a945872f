"""Layer profiles: the format and its errors, lookup, comparison, and the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil

import pytest
from conftest import ROOT
from profile_data import CURVES, GOOD

from py_reasonalloc import BudgetConfig, ConfigError, ProfileError, ReasonLlama
from py_reasonalloc.engine import bindings as c
from py_reasonalloc.engine.identity import BLOCK_BYTES, N_BLOCKS, family_slug, read_identity
from py_reasonalloc.profile.files import (
    MAX_FILE_BYTES,
    Recommendation,
    load_profile,
    profiles_folder,
)
from py_reasonalloc.profile.lookup import cached_path, find_profile, resolve_profile, save_to_cache
from py_reasonalloc.profile.plot import terminal_plot
from py_reasonalloc.run.probes import MAX_PROMPTS

pytestmark = pytest.mark.usefixtures("cache")


# --- the format ----------------------------------------------------------------------------------


def test_round_trip(good_file) -> None:
    found = load_profile(good_file)
    assert found == GOOD
    assert found.source == str(good_file)
    ragged = dataclasses.replace(GOOD, n_head_kv=(2, 0), demand=(3.0, 0.0))
    ragged.save(good_file)
    assert load_profile(good_file) == ragged
    assert [p.name for p in good_file.parent.glob("*good*")] == ["good.json"]


def test_curves_round_trip(tmp_path) -> None:
    path = tmp_path / "p.json"
    whole = dataclasses.replace(GOOD, head_error=CURVES)
    whole.save(path)
    assert load_profile(path) == whole != GOOD
    text = path.read_text()
    assert '"grid": [ 20, 32, 64 ]' in text and json.loads(text) == whole.to_json()
    assert text.count("\n") < 50  # a line for each head


def test_version_1_is_read(tmp_path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**GOOD.to_json(), "format_version": 1}))
    assert load_profile(path) == GOOD
    whole = dataclasses.replace(GOOD, head_error=CURVES).to_json()
    path.write_text(json.dumps({**whole, "format_version": 1}))
    with pytest.raises(ProfileError, match="head_error: format version 1 has none"):
        load_profile(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [20, 64, 32]}, "head_error.grid: must ascend"),
        ({"grid": [20, 20, 32]}, "head_error.grid: must ascend"),
        ({"grid": [0, 32, 64]}, r"head_error.grid\[0\]: 0 is less than the minimum of 1"),
        ({"grid": [20]}, r"head_error.grid: \[20\] is too short"),
        ({"grid": list(range(1, 99))}, "head_error.grid: .* is too long"),
        ({"base": 21}, "head_error.base: 21 is more than the first of the grid"),
        ({"base": -1}, "head_error.base: -1 is less than the minimum of 0"),
        ({"buffer": 0}, "head_error.buffer: 0 is less than the minimum of 1"),
        ({"policy": "a\nb"}, "head_error.policy: .* does not match"),
        ({"merge": 1}, "head_error.merge: 1 is not of type 'boolean'"),
        ({"values": CURVES.values[:3]}, "head_error.values: 3 curves, but there are 4 KV heads"),
        ({"values": [[1.0, 2.0]] * 4}, r"head_error.values\[0\]: 2 errors, but the grid has 3"),
        ({"values": [[1.0, -2.0, 3.0]] * 4}, r"head_error.values\[0\]\[1\]: -2.0 is less than"),
        ({"values": [[1.0, 1e200, 3.0]] * 4}, r"values\[0\]\[1\]: 1e\+200 is greater than the"),
        ({"values": [["1", 1, 3.0]] * 4}, r"values\[0\]\[0\]: '1' is not of type 'number'"),
        ({"values": 7}, "head_error.values: 7 is not of type 'array'"),
        ({"extra": 7}, "head_error: .*'extra' was unexpected"),
        ({"grid": None}, r"head_error.grid: None is not of type 'array'"),
    ],
)
def test_bad_curves(tmp_path, change, message) -> None:
    path = tmp_path / "p.json"
    curves = {**CURVES.to_json(), **change}
    path.write_text(json.dumps({**GOOD.to_json(), "head_error": curves}))
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_curves_of_a_program_are_checked_too() -> None:
    values = ((math.nan, 1.0, 1.0), *CURVES.values[1:])
    with pytest.raises(ProfileError, match=r"head_error.values\[0\]: not all of them are numbers"):
        dataclasses.replace(GOOD, head_error=dataclasses.replace(CURVES, values=values))


def test_whole_numbers_may_be_written_with_a_point(tmp_path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**GOOD.to_json(), "n_layer": 2.0, "demand": [1, 2]}))
    found = load_profile(path)
    assert (found.n_layer, found.demand) == (2, (1.0, 2.0))
    assert isinstance(found.n_layer, int) and isinstance(found.demand[0], float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version: 3 is unknown, this ReasonAlloc reads 1 to 2"),
        ({"format_version": None}, "format_version: None is not one of"),
        ({"n_layer": 3}, "demand: 2 entries, but n_layer is 3"),
        ({"n_layer": 0}, "n_layer: 0 is less than the minimum of 1"),
        ({"n_layer": 2.5}, "n_layer: 2.5 is not of type 'integer'"),
        ({"n_layer": True}, "n_layer: True is not of type 'integer'"),
        ({"n_head_kv": [2]}, "n_head_kv: 1 entries, but n_layer is 2"),
        ({"n_head_kv": 0}, "n_head_kv: 0 is not valid"),
        ({"head_dim": -1}, "head_dim: -1 is less than the minimum of 1"),
        ({"demand": [1.0, -2.0]}, r"demand\[1\]: -2.0 is less than the minimum of 0"),
        ({"demand": [1.0, "2"]}, r"demand\[1\]: '2' is not of type 'number'"),
        ({"demand": [1.0, 1e30]}, r"demand\[1\]: 1e\+30 is greater than the maximum"),
        ({"demand": [0.0, 0.0]}, "demand: no layer has any"),
        ({"demand": []}, r"demand: \[\] should be non-empty|demand: \[\] is too short"),
        ({"demand": 7}, "demand: 7 is not of type 'array'"),
        ({"rho": 0}, "rho: 0 is less than or equal to the minimum of 0"),
        ({"rho": 1.5}, "rho: 1.5 is greater than the maximum of 1"),
        ({"gamma": -1}, "gamma: -1 is less than the minimum of 0"),
        ({"clip_lo": 1.1}, "clip_lo: 1.1 is greater than the maximum of 1"),
        ({"clip_hi": 0.9}, "clip_hi: 0.9 is less than the minimum of 1"),
        ({"n_prompts": 9}, "n_prompts: 9 is greater than the maximum of 8"),
        ({"n_steps": 0}, "n_steps: 0 is less than the minimum of 1"),
        ({"seed": -1}, "seed: -1 is less than the minimum of 0"),
        ({"name": "a\x1b[31mb"}, "name: .* does not match"),
        ({"name": "x" * 2000}, "name: 'xxx.* is too long"),
        ({"date": "yesterday"}, "date: 'yesterday' does not match"),
        ({"date": "2026-02-30"}, "date: 2026-02-30 is no day of the calendar"),
        ({"fingerprint": "sha256:12"}, "fingerprint: 'sha256:12' does not match"),
        ({"comment": "hi"}, "'comment' was unexpected"),
        ({"rho": 2, "gamma": -1, "seed": -1, "n_steps": 0}, "; and 1 more$"),
    ],
)
def test_bad_fields(tmp_path, change, message) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**GOOD.to_json(), **change}))
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable() and len(text) < 1000


@pytest.mark.parametrize("name", sorted(GOOD.to_json()))
def test_every_field_is_needed(tmp_path, name) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({k: v for k, v in GOOD.to_json().items() if k != name}))
    with pytest.raises(ProfileError, match=f"'{name}' is a required property"):
        load_profile(path)


def test_bad_files(tmp_path, good_file) -> None:
    text = good_file.read_text()
    cases = {
        text[: len(text) // 2]: "truncated or not JSON: .* at line",
        "": "truncated or not JSON",
        "[1, 2]": r"\[1, 2\] is not of type 'object'",
        text.replace("31.0", "NaN"): "NaN is not a number that a profile may hold",
        text.replace("31.0", "-Infinity"): "-Infinity is not a number",
        text.replace("31.0", "1e999"): r"demand\[1\]: inf is greater than the maximum",
        "[" * 100_000: "nested too deeply|truncated or not JSON",
        " " * (MAX_FILE_BYTES + 1): f"larger than {MAX_FILE_BYTES} bytes",
        text.replace("4000", "9" * 5000): "p.json: .",
    }
    path = tmp_path / "p.json"
    for content, message in cases.items():
        path.write_text(content)
        with pytest.raises(ProfileError, match=message):
            load_profile(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ProfileError, match="not UTF-8 text"):
        load_profile(path)
    with pytest.raises(ProfileError, match="none.json: cannot be read: No such file"):
        load_profile(tmp_path / "none.json")
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(tmp_path)


def test_a_profile_made_by_a_program_is_checked_too() -> None:
    with pytest.raises(ProfileError, match=r"demand\[0\]: nan is no number"):
        dataclasses.replace(GOOD, demand=(math.nan, 1.0))
    with pytest.raises(ProfileError, match="rho: nan is no number"):
        dataclasses.replace(GOOD, rho=math.nan)


def test_save_says_what_fails(tmp_path) -> None:
    with pytest.raises(ProfileError, match="cannot be written: No such file or directory"):
        GOOD.save(tmp_path / "no" / "p.json")


def test_the_schema_and_the_class_agree() -> None:
    schema = json.loads((profiles_folder() / "schema" / "profile.schema.json").read_text())
    assert set(schema["required"]) == GOOD.to_json().keys()
    recommendation = Recommendation(0.1, "rkv", 64, 16, 4, 8, "f16", 0.05, 0.09, 500, "0.1", "c")
    more = {
        "horizon": 128,
        "recommendation": recommendation,
        "head_error": CURVES,
        "centres": bytes(8),
    }
    whole = dataclasses.replace(GOOD, **more).to_json()
    assert schema["properties"].keys() == whole.keys()
    inner = schema["properties"]["recommendation"]
    assert set(inner["required"]) == inner["properties"].keys() == set(Recommendation._fields)
    curves = schema["properties"]["head_error"]
    assert set(curves["required"]) == curves["properties"].keys() == whole["head_error"].keys()
    assert schema["properties"]["n_prompts"]["maximum"] == MAX_PROMPTS


# --- what reaches the engine ---------------------------------------------------------------------


def test_profile_reaches_the_library(good_file) -> None:
    profile = dataclasses.replace(GOOD, gamma=0.75, clip_lo=0.1, clip_hi=3.0)
    native = BudgetConfig(layers="wave", heads="adaptive", profile=profile, mu=0.5).to_native()
    assert native.layer_demand[: native.n_layer_demand] == [10.5, 31.0]
    assert (native.gamma, native.clip_lo, native.clip_hi, native.mu) == (0.75, 0.1, 3.0, 0.5)
    assert (native.layer_alloc, native.head_alloc) == (b"wave", b"adaptive")
    native = BudgetConfig(layers="wave", profile=profile, gamma=1.0).to_native()
    assert (native.gamma, native.clip_lo) == (1.0, 0.1)
    native = BudgetConfig(layers="pyramid", profile=profile).to_native()
    assert (native.gamma, native.n_layer_demand) == (0.5, 0)
    assert BudgetConfig(layers="wave", profile=str(good_file)).profile == GOOD
    assert len({BudgetConfig(layers="wave", profile=GOOD) for _ in range(2)}) == 1


def budgets(llama) -> list[int]:
    return [layer[0].budget for layer in llama.kv_stats().layers]


def test_session_takes_profiles(make_gguf, good_file, cache) -> None:
    path = make_gguf()
    with ReasonLlama(path, budget=64, profile=good_file) as llama:
        assert (llama.config.layers, llama.config.heads) == ("wave", "uniform")
        wave = budgets(llama)
        assert sum(wave) == 128 and wave[0] < wave[1]
    with ReasonLlama(path, budget=64, profile="auto") as llama:  # nothing fits
        assert (llama.config.layers, llama.config.heads) == ("uniform", "uniform")
    save_to_cache(GOOD, read_identity(path))
    with ReasonLlama(path, budget=64, profile="auto") as llama:  # what fits has no curves
        assert llama.config.layers == "uniform"
    with ReasonLlama(path, budget=64, profile="auto", layers="wave", heads="adaptive") as llama:
        assert (budgets(llama), llama.config.heads) == (wave, "adaptive")
    with ReasonLlama(path, budget=64) as llama:
        assert (llama.config.layers, llama.config.heads) == ("uniform", "uniform")
    with ReasonLlama(path, budget=64, layers=[80, 48]) as llama:
        assert budgets(llama) == [80, 48]
    with ReasonLlama(path, budget=64, layers="pyramid", profile="auto") as llama:
        assert budgets(llama)[0] > budgets(llama)[1]
    with pytest.raises(ConfigError, match="profile: already part of the BudgetConfig"):
        ReasonLlama(path, BudgetConfig(), profile="auto")
    with pytest.raises(ConfigError, match="layers = 'wave' needs a profile"):
        ReasonLlama(path, layers="wave")
    with pytest.raises(ProfileError, match="n_layer: 2, but .* has 3 layers"):
        ReasonLlama(make_gguf(n_layer=3), profile=good_file)


def test_budget_sums_that_cannot_be_met() -> None:
    config = BudgetConfig(budget=64, layers="wave", profile=GOOD).to_native()
    config.budget = 12
    assert c.ra_config_check(config) != c.RA_STATUS_OK
    assert "budget 12 is too small" in c.last_error()


# --- fingerprint and lookup ----------------------------------------------------------------------


def test_identity(make_gguf) -> None:
    found = read_identity(make_gguf(arch="qwen2", n_layer=3, n_head=8, n_head_kv=2, head_dim=64))
    assert (found.architecture, found.n_layer, found.n_head_kv) == ("qwen2", 3, 2)
    assert (found.head_dim, found.families[0]) == (64, "random-qwen2")
    ragged = read_identity(make_gguf(arch="deci", n_layer=3, n_head_kv=(4, 0, 1)))
    assert ragged.n_head_kv == (4, 0, 1)
    assert family_slug("DeepSeek R1 Distill-Llama_8B!") == "deepseek-r1-distill-llama-8b"


def test_fingerprint(make_gguf, tmp_path) -> None:
    path = make_gguf(n_layer=2, head_dim=128, n_ff=1024)  # more data than the sample
    first = read_identity(path).fingerprint
    assert re.fullmatch("sha256:[0-9a-f]{64}", first)
    copy = tmp_path / "copy.gguf"
    shutil.copy(path, copy)
    assert read_identity(copy).fingerprint == first
    data = bytearray(copy.read_bytes())
    assert len(data) > 2 * N_BLOCKS * BLOCK_BYTES / 2
    for place in (len(data) - 1, data.index(b"random llama")):
        changed = bytearray(data)
        changed[place] ^= 1
        copy.write_bytes(changed)
        assert read_identity(copy).fingerprint != first
    copy.write_bytes(data + b"\0")
    assert read_identity(copy).fingerprint != first
    assert read_identity(make_gguf(seed=1)).fingerprint != read_identity(make_gguf()).fingerprint


def test_lookup_order(make_gguf, monkeypatch, tmp_path, good_file) -> None:
    path, shipped = make_gguf(), tmp_path / "shipped"
    shutil.copytree(profiles_folder() / "schema", shipped / "schema")
    load_profile(good_file)  # the schema has been read from where it is
    monkeypatch.setattr("py_reasonalloc.profile.lookup.profiles_folder", lambda: shipped)
    assert find_profile(path) is None

    others = {
        "layers": {"n_layer": 3, "demand": (1.0, 2.0, 3.0)},
        "architecture": {"architecture": "qwen2"},
        "family": {"family": "random"},
        "heads": {"n_head_kv": 4},
    }
    for name, change in others.items():
        dataclasses.replace(GOOD, name=name, **change).save(shipped / f"{name}.json")
    assert find_profile(path) is None

    dataclasses.replace(GOOD, name="old", date="2025-01-01").save(shipped / "old.json")
    assert find_profile(path).name == "old"
    dataclasses.replace(GOOD, name="new").save(shipped / "new.json")
    assert (find_profile(path).name, find_profile(path).source) == ("new", "new")

    identity = read_identity(path)
    save_to_cache(dataclasses.replace(GOOD, name="mine"), identity)
    assert find_profile(path).name == "mine"
    assert find_profile(make_gguf(seed=1)).name == "new"  # the same family, another file

    wrong = dataclasses.replace(GOOD, n_layer=3, demand=(1.0, 2.0, 3.0))
    wrong.save(cached_path(identity))
    assert find_profile(path).name == "new"
    cached_path(identity).write_text("{")
    with pytest.raises(ProfileError, match=f"{identity.fingerprint[7:]}.json: truncated"):
        find_profile(path)

    assert resolve_profile(path, None) is None
    assert resolve_profile(path, good_file) == GOOD
    with pytest.raises(ProfileError, match="n_layer: 3, but .* has 2 layers"):
        resolve_profile(path, wrong)


def test_shipped_profiles_are_valid(demo_model) -> None:
    files = list(profiles_folder().glob("*.json"))
    assert files
    for file in files:
        profile = load_profile(file)
        assert profile.name == file.stem
        assert f"-o {file.name}" in profile.command
    assert find_profile(demo_model).source == "demo-reasoner-horizon"


def test_the_docs_show_the_shipped_profile() -> None:
    page = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    shown = page.split("<!-- demo profile -->\n```\n")[1].split("\n```")[0]
    files = (profiles_folder() / f"demo-reasoner{kind}.json" for kind in ("", "-horizon"))
    assert shown == "\n".join(terminal_plot(load_profile(file)) for file in files)


def test_cache_folder_that_cannot_be_made(make_gguf, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REASONALLOC_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ProfileError, match="cannot be made: .*REASONALLOC_CACHE_DIR"):
        save_to_cache(GOOD, read_identity(make_gguf()))
