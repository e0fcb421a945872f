"""Shapes of well-known reasoners: what speed and memory depend on, without their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..engine.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Widths of a dense decoder model.

    Attributes
    ----------
    arch : {"qwen2", "llama"}
        Architecture of llama.cpp; qwen2 has biases on Q, K and V.
    n_layer, n_embd, n_ff, n_vocab : int
        Blocks, width of the residual stream, of the feed-forward part, tokens.
    n_head, n_head_kv, head_dim : int
        Query heads, KV heads, values of a K and V row.
    n_ctx_train : int
        Trained context, tokens.
    rope_base, norm_eps : float
        Base of the rotary positions; epsilon of the norms.
    is_tied : bool
        The output matrix is the embedding.
    """

    arch: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_vocab: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ctx_train: int
    rope_base: float
    norm_eps: float
    is_tied: bool = False


_QWEN_14B = ModelShape(
    arch="qwen2",
    n_layer=48,
    n_embd=5120,
    n_ff=13824,
    n_vocab=152064,
    n_head=40,
    n_head_kv=8,
    head_dim=128,
    n_ctx_train=131072,
    rope_base=1e6,
    norm_eps=1e-5,
)

#: As published in the models' config.json (llama 3.1's frequency scaling is left out: it changes
#: neither size nor speed). "demo" is the model that comes with this package.
SHAPES = {
    "r1-qwen-1.5b": ModelShape(
        arch="qwen2",
        n_layer=28,
        n_embd=1536,
        n_ff=8960,
        n_vocab=151936,
        n_head=12,
        n_head_kv=2,
        head_dim=128,
        n_ctx_train=131072,
        rope_base=1e4,
        norm_eps=1e-6,
    ),
    "r1-llama-8b": ModelShape(
        arch="llama",
        n_layer=32,
        n_embd=4096,
        n_ff=14336,
        n_vocab=128256,
        n_head=32,
        n_head_kv=8,
        head_dim=128,
        n_ctx_train=131072,
        rope_base=5e5,
        norm_eps=1e-5,
    ),
    "r1-qwen-14b": _QWEN_14B,
    "acereason-14b": _QWEN_14B,  # trained further from r1-qwen-14b
    "demo": ModelShape(
        arch="qwen2",
        n_layer=6,
        n_embd=256,
        n_ff=384,
        n_vocab=342,
        n_head=8,
        n_head_kv=4,
        head_dim=32,
        n_ctx_train=4096,
        rope_base=1e6,
        norm_eps=1e-6,
        is_tied=True,
    ),
}


def check_shape_name(name: str) -> None:
    """Raise ConfigError unless `name` is a known shape or looks like a model file."""
    if name not in SHAPES and Path(name).suffix != ".gguf":
        raise ConfigError(
            f"shape = {name!r} is unknown: must be one of {', '.join(SHAPES)}, or a .gguf file"
        )
