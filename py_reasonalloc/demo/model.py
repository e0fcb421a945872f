"""The demo reasoner's network in PyTorch: llama.cpp's ``qwen2`` architecture, tensor for tensor.

RMSNorm, grouped-query attention with biases on Q, K and V, rotary positions in the NEOX layout
(first half paired with second half), SwiGLU, tied embeddings.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..task.vocab import BOS_ID, token_id


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network (all counts; head size in elements)."""

    n_vocab: int
    n_embd: int = 256
    n_layer: int = 6
    n_head: int = 8
    n_head_kv: int = 4
    n_ff: int = 384
    rope_base: float = 1e6
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.n_embd // self.n_head

    def to_dict(self) -> dict[str, float]:
        """Return plain values for a checkpoint."""
        return asdict(self)


def rope_tables(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [n_pos, head_dim / 2], for integer positions [n_pos]."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = positions.float()[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., n_pos, head_dim] by tables [n_pos, head_dim / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, n_embd: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x [..., n_embd]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class KeyDropout:
    """Keys that go missing for good, some time after they were written: other ones in each head.

    A model that never met a gap in its cache may let an idle head rest on any word; here only the
    prompt can be relied on.

    Parameters
    ----------
    n_prompt : Tensor
        Tokens of each row that are never hidden, int64 [B].
    rate : Tensor
        Share of the other keys that go missing, float32 [B].
    delay : Tensor
        Queries, int64 [B], that still see a key before it does.
    gen : torch.Generator
        Draws the keys.
    """

    def __init__(self, n_prompt: Tensor, rate: Tensor, delay: Tensor, gen: torch.Generator) -> None:
        self.n_prompt, self.rate, self.delay, self.gen = n_prompt, rate, delay, gen

    def mask(self, n_tokens: int, config: ModelConfig) -> Tensor:
        """Draw what the queries of one layer may see: bool [B, n_head, T, T]."""
        n_rows = len(self.rate)
        at = torch.arange(n_tokens)
        draws = torch.rand((n_rows, config.n_head_kv, n_tokens), generator=self.gen)
        lost = draws < self.rate[:, None, None]
        lost &= (at >= self.n_prompt[:, None])[:, None]
        age = at[:, None] - at[None, :]
        late = age >= self.delay[:, None, None]
        seen = (age >= 0) & ~(lost[:, :, None, :] & late[:, None])
        return seen.repeat_interleave(config.n_head // config.n_head_kv, 1)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        n_kv = config.n_head_kv * config.head_dim
        self.q = nn.Linear(config.n_embd, config.n_embd)
        self.k = nn.Linear(config.n_embd, n_kv)
        self.v = nn.Linear(config.n_embd, n_kv)
        self.o = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated q [B, n_head, T, d], rotated k and plain v [B, n_head_kv, T, d]."""
        batch, length, _ = x.shape
        d = self.config.head_dim

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, -1, d).transpose(1, 2)

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, probes: Tensor | None, hide: KeyDropout | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, T, n_embd] and the mean entropy (nats) at the probe positions."""
        group = self.config.n_head // self.config.n_head_kv
        q, k, v = self.project(x, cos, sin)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mask = None if hide is None else hide.mask(x.shape[1], self.config)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        out = self.o(out.transpose(1, 2).reshape(x.shape))
        if probes is None:
            return out, None
        scores = q[:, :, probes] @ k.transpose(2, 3) / math.sqrt(self.config.head_dim)
        future = torch.arange(k.shape[2])[None, :] > probes[:, None]
        logp = scores.masked_fill(future, -1e9).log_softmax(-1)
        return out, -(logp.exp() * logp).sum(-1).mean()


class Block(nn.Module):
    """Attention and feed-forward network, each behind a norm and around a skip."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.gate = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.down = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return x plus its feed-forward update, x [..., n_embd]."""
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, probes: Tensor | None, hide: KeyDropout | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the block's output [B, T, n_embd] and the attention entropy, if asked for."""
        out, entropy = self.attn(self.attn_norm(x), cos, sin, probes, hide)
        return self.feed_forward(x + out), entropy


class DemoModel(nn.Module):
    """The whole network, with tied embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.n_vocab, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)

    @property
    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return cast("list[Block]", list(self.blocks))

    def forward(
        self, ids: Tensor, probes: Tensor | None = None, hide: KeyDropout | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits [B, T, n_vocab] and mean attention entropy (None without probe positions).

        Parameters
        ----------
        ids : Tensor
            Token ids, int64 [B, T], the start token first.
        probes : Tensor, optional
            Query positions, int64 [n_probe], at which the entropy is taken.
        hide : KeyDropout, optional
            Which keys to hide (training only); each layer draws its own.
        """
        cos, sin = rope_tables(
            torch.arange(ids.shape[1]), self.config.head_dim, self.config.rope_base
        )
        x = self.embed(ids)
        entropies: list[Tensor] = []
        for block in self.layers:
            x, entropy = block(x, cos, sin, probes, hide)
            if entropy is not None:
                entropies.append(entropy)
        logits = self.norm(x) @ self.embed.weight.T
        return logits, torch.stack(entropies).mean() if entropies else None

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Start from small random weights plus the lookup circuits of `_init_circuits`."""
        gen = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                scale = 0.08 if name.startswith("embed") else 0.5 / math.sqrt(p.shape[1])
                is_out = name.endswith(("o.weight", "down.weight"))
                p.normal_(
                    0.0,
                    scale / math.sqrt(2 * self.config.n_layer) if is_out else scale,
                    generator=gen,
                )
            elif name.endswith("bias"):
                p.zero_()
        self._init_circuits(gen)
        self._init_rest()

    def _init_rest(self) -> None:
        """Let heads with nothing to look up rest on the start token, from the first step on.

        Embedding dimension 0 is the start token's alone; its key scores about 10 nats through the
        slowest rotary dimension, which hardly turns within any context. Positional heads stay as
        they are. Without this, idle heads spread over everything, and any eviction moves every
        output.
        """
        d = self.config.head_dim
        self.embed.weight[:, 0] = 0.0
        self.embed.weight[BOS_ID] = 0.0
        self.embed.weight[BOS_ID, 0] = 1.28
        for il, block in enumerate(self.layers):
            attn = block.attn
            attn.o.weight[0] = 0.0
            block.down.weight[0] = 0.0
            for layer, first_head in ((attn.q, 4 if il == 0 else 0), (attn.k, 2 if il == 0 else 0)):
                for head in range(first_head, layer.weight.shape[0] // d):
                    rows = [head * d + d // 2 - 1, head * d + d - 1]
                    layer.weight[rows] = 0.0
                    if layer is attn.q:
                        layer.bias[rows[0]] = 3.0
                    else:
                        layer.weight[rows[0], 0] = (1.2, 1.6, 2.5)[min(il, 2)]

    def _init_circuits(self, gen: torch.Generator) -> None:
        """Give some heads of the first two layers a head start; everything is trained further.

        Layer 0: four heads that look 1, 2, 3 and 4 tokens back. Layer 1: heads that match what
        stood some tokens before the query with what stood some tokens before the key, which is how
        a value is found by its name. Without this, lookups form slowly, or not in the time given.
        """
        c, d = self.config, self.config.head_dim
        group, half = c.n_head // c.n_head_kv, d // 2
        theta = c.rope_base ** (-torch.arange(half) * 2.0 / d)
        fast = torch.arange(half) < half // 2

        def orthogonal(rows: int) -> Tensor:
            return torch.linalg.qr(torch.randn(c.n_embd, c.n_embd, generator=gen))[0][:rows]

        first = self.layers[0].attn
        codes = orthogonal(2 * d).view(2, d, c.n_embd)  # what the two KV heads read
        writes = orthogonal(4 * d).view(4, d, c.n_embd)  # where heads looking 1..4 back write
        for offset in range(1, 5):
            head = offset - 1
            kv = head // group
            rows, kv_rows = slice(head * d, head * d + d), slice(kv * d, kv * d + d)
            amplitude = 8.0 * fast
            first.q.weight[rows] *= 0.1
            first.k.weight[kv_rows] *= 0.1
            first.q.bias[rows] = torch.cat(
                (amplitude * (offset * theta).cos(), -amplitude * (offset * theta).sin())
            )
            first.k.bias[kv_rows] = torch.cat((amplitude, torch.zeros(half)))
            first.v.weight[kv_rows] = codes[kv]
            first.o.weight[:, rows] = 0.14 * writes[head].T
        self._init_matchers(codes[0], writes, gen)

    def _init_matchers(self, own: Tensor, writes: Tensor, gen: torch.Generator) -> None:
        """Fill heads of layer 1 that find a key by a name (12 slow dimensions) and a kind of place.

        A kind of place is one more dimension: it tells the value behind ``X is`` from the operand
        behind ``X plus``. Match and kind together score about 15 nats, the start token 10.

        Parameters
        ----------
        own : Tensor
            Code of a token's own content, [d, n_embd].
        writes : Tensor
            Where the heads of layer 0 that look 1, 2, 3 and 4 back write that code, [4, d, n_embd].
        gen : torch.Generator
            For the value projections.
        """
        c, d = self.config, self.config.head_dim
        half, attn = d // 2, self.layers[1].attn
        code_dims = [*range(half // 2, half - 2), *range(half + half // 2, d - 2)]
        signs, gives, equals = (" plus", " minus"), (" gives",), (" is",)

        def place_of(texts: tuple[str, ...], back: int) -> Tensor:
            """Direction [n_embd] that reads 1 where such a token stands `back` tokens before."""
            e = self.embed.weight[[token_id(text) for text in texts]].mean(0)
            if back == 0:
                return e / e.dot(e) / 7.8
            code = own @ (e * 12.5)
            return writes[back - 1].T @ code / code.dot(code) / 1.1

        # query head, what it offers, KV head, what the key offers, kind of place, its dimension
        matchers = (
            (0, writes[0], 0, writes[1], place_of(equals, 1), 0),  # X is -> value
            (2, own, 1, writes[0], place_of(signs, 0), 0),  # X -> plus or minus
            (3, writes[1], 1, writes[0], place_of(gives, 2), half),  # X is v -> mark after X
            (4, writes[2], 2, writes[3], place_of(gives, 1), 0),  # X plus v gives -> name
            (6, writes[0], 3, writes[1], place_of(signs, 1), 0),  # X plus -> operand
        )
        for head, query, kv, key, kind, shift in matchers:
            for layer, index, read in ((attn.q, head, query), (attn.k, kv, key)):
                layer.weight[[index * d + i for i in code_dims]] = 2.5 * read[: len(code_dims)]
            attn.k.weight[kv * d + half - 2 + shift] = 5.5 * kind
            for other in (half - 2, d - 2):
                attn.q.weight[head * d + other] = 0.0
            attn.q.bias[head * d + half - 2 + shift] = 5.5
            values = torch.linalg.qr(torch.randn(c.n_embd, c.n_embd, generator=gen))[0][:d]
            if shift == 0:
                attn.v.weight[kv * d : (kv + 1) * d] = values
            copied = attn.v.weight[kv * d : (kv + 1) * d]
            attn.o.weight[:, head * d : (head + 1) * d] = 0.14 * copied.T
