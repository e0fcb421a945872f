"""Requests on the wire: every cache survives, and what is wrong with one is named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from py_reasonalloc import ConfigError, __version__
from py_reasonalloc.eval.cases.methods import Arm, Common, parse_arms, setup_of
from py_reasonalloc.eval.remote.wire import (
    FIELD,
    Served,
    parse_request,
    setup_from_json,
    setup_to_json,
)
from py_reasonalloc.profile.files import Recommendation, load_profile, profiles_folder
from py_reasonalloc.profile.lookup import find_profile


def test_every_cache_survives_the_wire(demo_model) -> None:
    common = Common(16, 4, 8, 40, "q4_0", find_profile(demo_model))
    labels = ["full", "rkv+lambda=0.3", "h2o", "random", "pyramid-rkv", "wave+gamma=1", "adaptive"]
    labels += ["adaptive+attention=layer", "reasonalloc+policy=snapkv+clip_lo=0+value_guard=2"]
    for arm in parse_arms(labels, [200]):
        setup = setup_of(arm, common)
        if setup.config is not None:
            setup = setup._replace(config=replace(setup.config, policy_seed=2**63))
        assert setup_from_json(json.loads(json.dumps(setup_to_json(setup))), 4096) == setup


def test_profiles_without_a_horizon_survive_it_and_recommendations_stay_here() -> None:
    paper = load_profile(profiles_folder() / "demo-reasoner.json")
    assert paper.horizon == 0
    found = Recommendation(0.1, "rkv", 64, 16, 4, 8, "f16", 0.05, 0.09, 500, "0.1.0", "command")
    recommending = replace(paper, recommendation=found)
    arm = Arm("wave", 200)
    sent = setup_to_json(setup_of(arm, Common(16, 4, 8, 0, "f16", recommending)))
    received = setup_from_json(json.loads(json.dumps(sent)), 4096)
    assert received == setup_of(arm, Common(16, 4, 8, 0, "f16", paper))


SERVED = Served("model.gguf", "sha256:1", 1000, 500)


MESSAGES = [{"role": "user", "content": "2+2?"}]


def own(**fields: object) -> dict[str, Any]:
    base = setup_to_json(setup_of(Arm("rkv", 64), Common(16, 4, 8, 0, "f16", None)))
    ours = {"version": __version__, "fingerprint": "sha256:1", "n_ctx": 100, "raw": False, **base}
    return {"messages": MESSAGES, FIELD: {**ours, **fields}}


def with_config(**fields: object) -> dict[str, Any]:
    body = own()
    body[FIELD]["config"] |= fields
    return body


BAD_BODIES = [
    ([], "must be an object"),
    ({}, "messages must be a list"),
    ({"messages": []}, "messages must be a list"),
    ({"messages": MESSAGES * 2}, "list of one message"),
    ({"messages": ["hi"]}, "messages must be a list"),
    ({"messages": [{"role": "system", "content": "hi"}]}, "must be user"),
    ({"messages": [{"role": "user", "content": 3}]}, "content must be text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content must be text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ({"messages": MESSAGES, "temperature": "hot"}, "temperature = 'hot' must be a number"),
    ({"messages": MESSAGES, "temperature": -1}, "temperature = -1 is out of range"),
    ({"messages": MESSAGES, "top_p": 1.5}, "top_p = 1.5 is out of range"),
    ({"messages": MESSAGES, "seed": -1}, "seed = -1 is out of range"),
    ({"messages": MESSAGES, "seed": True}, "seed = True must be a whole number"),
    ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens = 0 is out of range"),
    ({"messages": MESSAGES, "max_tokens": 1e9}, "max_tokens = 1000000000.0 must be a whole"),
    ({"messages": MESSAGES, "stream": True}, "stream: this server does without"),
    ({"messages": MESSAGES, "n": 2}, "n: this server does without"),
    ({"messages": MESSAGES, "stop": ["x"]}, "stop: this server does not know"),
    ({"messages": MESSAGES, FIELD: []}, "reasonalloc must be an object"),
    ({"messages": MESSAGES, FIELD: {}}, "reasonalloc: the field 'config' is missing"),
    (own(version="0.0.1"), f"this server is reasonalloc {__version__}, the evaluation 0.0.1"),
    (own(fingerprint="sha256:2"), "another model than the evaluation: model.gguf"),
    (own(more=1), "reasonalloc: the field 'more' is unknown"),
    (own(n_ctx=1001), "n_ctx = 1001 is out of range: must be 1 to 1000"),
    (own(n_ctx="all"), "n_ctx = 'all' must be a whole number"),
    (own(raw=1), "raw = 1 must be true or false"),
    (own(kv_type=99), "kv_type = 99 must be a name"),
    (own(kv_type="q3"), "cache type = 'q3' is unknown"),
    (own(config=[]), "config must be an object"),
    (own(config={}), "config: the field '"),
    (with_config(more=1), "config: the field 'more' is unknown"),
    (with_config(budget="64"), "budget = '64' must be a whole number"),
    (with_config(budget=1 << 20), "more than twice the model's context"),
    (with_config(buffer=1 << 20), "more than twice the model's context"),
    (with_config(budget=9), "budget"),
    (with_config(policy="best"), "policy = 'best' is unknown"),
    (with_config(policy="\ud800"), "wrong type"),
    (with_config(mu=None), "wrong type"),
    (with_config(policy=None), "policy = None must be a name"),
    (with_config(layers=[64] * 6), "tables of budgets are not taken"),
    (with_config(head_budgets=[64] * 24), "tables of budgets are not taken"),
    (with_config(layers="wave"), "needs a profile"),
    (with_config(profile="/etc/passwd"), "profile: '/etc/passwd' is not of type 'object'"),
    (with_config(profile={}), "profile: 'format_version' is a required property"),
    (with_config(protect_prompt=[1]), "protect_prompt = [1] must be a whole number"),
]


@pytest.mark.parametrize(("body", "message"), BAD_BODIES, ids=lambda value: str(value)[:40])
def test_bad_requests_are_named(body, message) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_request(json.dumps(body).encode(), SERVED)
    assert message in str(caught.value)


def test_a_bad_profile_is_named(demo_model) -> None:
    setup = setup_of(Arm("wave", 64), Common(16, 4, 8, 0, "f16", find_profile(demo_model)))
    for field, value in (("demand", []), ("demand", "x"), ("n_layer", -1), ("gamma", None)):
        body = own(**setup_to_json(setup))
        assert parse_request(json.dumps(body).encode(), SERVED).request.setup == setup
        body[FIELD]["config"]["profile"][field] = value
        with pytest.raises(ConfigError, match=field):
            parse_request(json.dumps(body).encode(), SERVED)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@st.composite
def nearly_right_bodies(draw: Any) -> bytes:
    """Draw a good body with one value, somewhere in it, replaced by any other."""
    root: Any = own(config=dict(own()[FIELD]["config"])) | {"seed": 1, "temperature": 0.5}
    root = json.loads(json.dumps(root))
    place = root
    while True:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.booleans()):
            place[key] = draw(json_values)
            return json.dumps(root).encode()
        place = place[key]


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=60)
    | json_values.map(lambda v: json.dumps(v).encode())
    | nearly_right_bodies()
)
def test_a_body_is_understood_or_refused_with_one_error(body: bytes) -> None:
    try:
        wanted = parse_request(body, SERVED)
    except ConfigError:
        return
    assert 1 <= wanted.n_ctx <= 1000 and wanted.request.prompt == wanted.request.prompt
