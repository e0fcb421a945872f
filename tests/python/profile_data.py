"""A layer profile and error curves, as the tests of profiles use them."""

from __future__ import annotations

from py_reasonalloc.profile.files import Profile
from py_reasonalloc.profile.head_error import HeadError

GOOD = Profile(
    name="test",
    family="random-llama",
    architecture="llama",
    n_layer=2,
    n_head_kv=2,
    head_dim=32,
    demand=(10.5, 31.0),
    rho=0.93,
    gamma=0.5,
    clip_lo=0.25,
    clip_hi=2.0,
    n_prompts=8,
    n_steps=4000,
    seed=0,
    tool_version="0.1.0",
    date="2026-01-31",
    fingerprint="sha256:" + "0" * 64,
    command="reasonalloc-profile m.gguf -o test.json",
)

CURVES = HeadError(
    grid=(20, 32, 64),
    base=20,
    buffer=16,
    policy="loss",
    merge=True,
    values=((4.0, 2.0, 0.5), (1.0, 0.1, 0.0), (1e-9, 0.0, 0.0), (3.0, 3.5, 0.25)),
)
