"""A decoder in NumPy, read from a GGUF: the independent oracle for what the engine computes.

Float64 throughout, whole sequence at once. Architectures: llama, qwen2, qwen3. Which cached tokens
a query may see is an argument, per layer and KV head: any sequence of evictions can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

Array = np.ndarray


@dataclass
class LayerActivations:
    """Queries and keys after RoPE: q [n_head, T, head_dim], k [n_head_kv, T, head_dim].

    The residual stream behind the block: x [T, n_embd].

    Before each compression of the layer, as merging has left them: values v[i]
    [n_head_kv, T, head_dim] and biases of the keys bias[i] [n_head_kv, T].
    """

    q: Array
    k: Array
    v: list[Array]
    bias: list[Array]
    x: Array | None = None


def merge_rows(v: Array, target: Array, share: Array) -> Array:
    """Values [n, d] of a head after a merge: token j goes into target[j], if that is not -1."""
    goes = target >= 0
    merged = v * np.where(goes, 1.0, share)[:, None]
    np.add.at(merged, target[goes], share[goes, None] * v[goes])
    return merged


class NumpyModel:
    """Weights of a GGUF in float64, and its forward pass."""

    def __init__(self, path: Path | str) -> None:
        reader = gguf.GGUFReader(str(path))
        self.arch = self._field(reader, "general.architecture")
        key = self.arch
        self.n_layer = int(self._field(reader, f"{key}.block_count"))
        self.n_head = int(self._field(reader, f"{key}.attention.head_count"))
        self.n_head_kv = int(self._field(reader, f"{key}.attention.head_count_kv"))
        self.eps = float(self._field(reader, f"{key}.attention.layer_norm_rms_epsilon"))
        self.rope_base = float(self._field(reader, f"{key}.rope.freq_base"))
        self.weights = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
            for t in reader.tensors
        }
        self.head_dim = self.weights["blk.0.attn_k.weight"].shape[0] // self.n_head_kv
        self.kq_scale = self.head_dim**-0.5

    @staticmethod
    def _field(reader: gguf.GGUFReader, name: str) -> object:
        field = reader.fields[name]
        value = field.parts[field.data[0]]
        return bytes(value).decode() if field.types[0] == gguf.GGUFValueType.STRING else value[0]

    def _linear(self, x: Array, name: str) -> Array:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, x: Array, name: str) -> Array:
        scale = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weights[f"{name}.weight"]

    def _rope(self, x: Array) -> Array:
        """Rotate x [n, T, head_dim] at positions 0..T-1."""
        half = self.head_dim // 2
        angle = np.arange(x.shape[1])[:, None] * self.rope_base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle), np.sin(angle)
        if self.arch == "llama":  # pairs of neighbours
            a, b = x[..., 0::2], x[..., 1::2]
            out = np.empty_like(x)
            out[..., 0::2], out[..., 1::2] = a * cos - b * sin, a * sin + b * cos
            return out
        a, b = x[..., :half], x[..., half:]  # halves (NEOX)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def _heads(self, x: Array, name: str, n: int) -> Array:
        return self._linear(x, name).reshape(len(x), n, self.head_dim).transpose(1, 0, 2)

    def forward(
        self,
        tokens: Sequence[int],
        visible: Sequence[Array] | None = None,
        compressions: Sequence[Sequence[object]] | None = None,
    ) -> tuple[Array, list[LayerActivations]]:
        """Run the sequence.

        Parameters
        ----------
        tokens : sequence of int
            [T]
        visible : sequence of bool arrays, optional
            Per layer [n_head_kv, T, T]: may query t of KV head h see token j. Default: causal.
        compressions : sequence of sequences, optional
            Per layer its compressions in order, with `n_pos` and, per KV head, `positions` and,
            where tokens were merged, `target`, `share` and `bias`. Default: none.

        Returns
        -------
        logits : [T, n_vocab]
        layers : activations per layer
        """
        causal = np.tril(np.ones((len(tokens), len(tokens)), bool))
        x = self.weights["token_embd.weight"][np.asarray(tokens)]
        layers = []
        for il in range(self.n_layer):
            mask = np.broadcast_to(causal, (self.n_head_kv, *causal.shape))
            mask = mask if visible is None else mask & visible[il]
            events = compressions[il] if compressions is not None else []
            attended, activations = self._attention(x, f"blk.{il}", mask, events)
            layers.append(activations)
            x = x + attended
            h = self._norm(x, f"blk.{il}.ffn_norm")
            gate = self._linear(h, f"blk.{il}.ffn_gate")
            gate = gate / (1.0 + np.exp(-gate))
            x = x + self._linear(gate * self._linear(h, f"blk.{il}.ffn_up"), f"blk.{il}.ffn_down")
            activations.x = x
        output = "output" if "output.weight" in self.weights else "token_embd"
        return self._linear(self._norm(x, "output_norm"), output), layers

    def _attention(
        self, x: Array, blk: str, mask: Array, events: Sequence
    ) -> tuple[Array, LayerActivations]:
        h = self._norm(x, f"{blk}.attn_norm")
        q = self._heads(h, f"{blk}.attn_q", self.n_head)
        k = self._heads(h, f"{blk}.attn_k", self.n_head_kv)
        v = self._heads(h, f"{blk}.attn_v", self.n_head_kv)
        if f"{blk}.attn_q_norm.weight" in self.weights:
            q, k = self._norm(q, f"{blk}.attn_q_norm"), self._norm(k, f"{blk}.attn_k_norm")
        q, k = self._rope(q), self._rope(k)
        n_group = self.n_head // self.n_head_kv
        v, bias = v.copy(), np.zeros(v.shape[:2])
        activations = LayerActivations(q, k, [], [])
        parts, start = [], 0
        for event in [*events, None]:
            stop = len(x) if event is None else event.n_pos
            out = []
            for i in range(self.n_head):
                h = i // n_group
                logits = q[i, start:stop] @ k[h].T * self.kq_scale + bias[h]
                logits = np.where(mask[h, start:stop], logits, -np.inf)
                weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
                out.append(weights / weights.sum(axis=-1, keepdims=True) @ v[h])
            parts.append(np.concatenate(out, axis=-1))
            start = stop
            activations.v.append(v.copy())
            activations.bias.append(bias.copy())
            for h in range(self.n_head_kv if event is not None and event.target else 0):
                pos = event.positions[h]
                v[h, pos] = merge_rows(v[h, pos], event.target[h], event.share[h])
                bias[h, pos] = event.bias[h]
        return self._linear(np.concatenate(parts), f"{blk}.attn_output"), activations


def write_f32_copy(source: Path | str, target: Path) -> Path:
    """Write `source` with all weights as f32, so that the engine does not quantise activations."""
    reader = gguf.GGUFReader(str(source))
    arch = NumpyModel._field(reader, "general.architecture")
    writer = gguf.GGUFWriter(str(target), arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = field.contents()
        writer.add_key_value(name, value, kind, sub_type=sub)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
