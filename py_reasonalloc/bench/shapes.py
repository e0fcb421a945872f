"""Shapes of well-known reasoners: what speed and memory depend on, without their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..engine.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Widths of a decoder model.

    Attributes
    ----------
    arch : {"qwen2", "llama", "qwen3moe", "gpt-oss"}
        Architecture of llama.cpp; qwen2 has biases on Q, K and V, qwen3moe norms on Q and K,
        gpt-oss biases everywhere, attention sinks, and a window on every other layer.
    n_layer, n_embd, n_ff, n_vocab : int
        Blocks, width of the residual stream, of the feed-forward part (of one expert, where there
        are any), tokens.
    n_head, n_head_kv, head_dim : int
        Query heads, KV heads, values of a K and V row.
    n_ctx_train : int
        Trained context, tokens.
    rope_base, norm_eps : float
        Base of the rotary positions; epsilon of the norms.
    is_tied : bool
        The output matrix is the embedding.
    n_expert, n_expert_used : int
        Experts of a block, and those that a token takes; 0: a dense model.
    n_window, window_period : int
        Tokens of the sliding windows; every so many layers the last one has none. 0 and 1: no
        windows.
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
    n_expert: int = 0
    n_expert_used: int = 0
    n_window: int = 0
    window_period: int = 1

    def with_layers(self, n_layer: int) -> ModelShape:
        """Return the shape with so many of its layers.

        Raises
        ------
        ConfigError
            It has fewer, or layers with and without a window would not alternate as they do.
        """
        if not 1 <= n_layer <= self.n_layer:
            raise ConfigError(f"--layers {n_layer}: the shape has 1 to {self.n_layer}")
        if n_layer % self.window_period != 0:
            raise ConfigError(
                f"--layers {n_layer}: must be a multiple of {self.window_period}: of so many "
                "layers one has no window"
            )
        return replace(self, n_layer=n_layer)


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

#: As published in the models' config.json (the frequency scaling of llama 3.1 and gpt-oss is left
#: out: it changes neither size nor speed). "demo" is the model that comes with this package.
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
    "gpt-oss-20b": ModelShape(
        arch="gpt-oss",
        n_layer=24,
        n_embd=2880,
        n_ff=2880,
        n_vocab=201088,
        n_head=64,
        n_head_kv=8,
        head_dim=64,
        n_ctx_train=131072,
        rope_base=1.5e5,
        norm_eps=1e-5,
        n_expert=32,
        n_expert_used=4,
        n_window=128,
        window_period=2,
    ),
    "qwen3-30b-a3b": ModelShape(
        arch="qwen3moe",
        n_layer=48,
        n_embd=2048,
        n_ff=768,
        n_vocab=151936,
        n_head=32,
        n_head_kv=4,
        head_dim=128,
        n_ctx_train=40960,
        rope_base=1e6,
        norm_eps=1e-6,
        n_expert=128,
        n_expert_used=8,
    ),
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
