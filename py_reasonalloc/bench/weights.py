"""Random-weight GGUF files of a given shape, written block by block.

Quantised blocks are drawn directly (random quants, scales that give every matrix the variance of a
fresh network), so no matrix is ever held: a file of 8 GB takes a few dozen MB of memory. The
same shape, type and seed give the same file, byte for byte.

Tensor types follow llama-quantize: "q4_0" keeps the output matrix in q6_K, "q4_k_m" takes q6_K for
that and for half of the V and down projections. Rows that are no multiple of 256 values take q8_0
and q4_0 instead of q6_K and q4_K. The experts of gpt-oss are in MXFP4, as published, and routers
in f32.
"""

from __future__ import annotations

import contextlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from ..engine.errors import ModelFileError
from ..engine.tempfiles import remove_stale, temporary_file
from .blocks import FILL, Floats
from .shapes import ModelShape

WEIGHTS = ("q4_0", "q8_0", "q4_k_m", "f16")
#: Raised whenever the same arguments give another file.
FORMAT_VERSION = 1

_CHUNK_BYTES = 1 << 20
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_SLACK_BYTES = 64 << 20  # header, vocabulary, and room for others on the disk


class TensorPlan(NamedTuple):
    """A tensor to write.

    Attributes
    ----------
    name : str
        As llama.cpp knows it.
    n_rows, n_cols : int
        Matrix [n_rows, n_cols]; a vector has n_rows = 0.
    kind : GGMLQuantizationType
        Type of its blocks; vectors are f32.
    std : float or array [n_rows]
        Standard deviation of the values (of each row); of a vector, around `mean`.
    mean : float
        Of a vector.
    n_expert : int
        Experts whose rows these are, one after another; 0: a matrix or vector of its own.
    """

    name: str
    n_rows: int
    n_cols: int
    kind: Kind
    std: float | Floats
    mean: float = 0.0
    n_expert: int = 0

    @property
    def n_outer(self) -> list[int]:
        """Dimensions but the last."""
        if self.n_expert in (0, self.n_rows):
            return [self.n_rows] if self.n_rows > 0 else []
        return [self.n_expert, self.n_rows // self.n_expert]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, or of the vector."""
        block, n_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return self.n_cols // block * n_bytes

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole tensor, without padding."""
        return max(self.n_rows, 1) * self.row_bytes


def tensor_chunks(plan: TensorPlan, seed: int) -> Iterator[bytes]:
    """Yield a tensor's bytes in pieces of about 1 MB."""
    # SFC64 is the fastest of NumPy's generators; each tensor has its own stream
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(plan.name.encode())]))
    if plan.n_rows == 0:
        values = plan.mean + plan.std * rng.standard_normal(plan.n_cols)
        yield values.astype("<f4").tobytes()
        return
    n_blocks = plan.n_cols // gguf.GGML_QUANT_SIZES[plan.kind][0]
    std = np.broadcast_to(np.asarray(plan.std, dtype=np.float64), (plan.n_rows,))
    step = max(_CHUNK_BYTES // plan.row_bytes, 1)
    for first in range(0, plan.n_rows, step):
        blocks = np.repeat(std[first : first + step], n_blocks)
        yield FILL[plan.kind](rng, blocks).tobytes()


# --- tensors ---------------------------------------------------------------------------------


def _kind(weights: str, role: str, il: int, shape: ModelShape, n_cols: int) -> Kind:
    """Return the type of a matrix; role: "output", "v", "down" or "" for the others."""
    if weights in ("f16", "q8_0"):
        return Kind[weights.upper()]
    n = shape.n_layer
    has_more_bits = il < n // 8 or il >= 7 * n // 8 or (il - n // 8) % 3 == 2
    wants_q6_k = role == "output" or (
        weights == "q4_k_m" and role in ("v", "down") and has_more_bits
    )
    if wants_q6_k:
        return Kind.Q6_K if n_cols % 256 == 0 else Kind.Q8_0
    return Kind.Q4_K if weights == "q4_k_m" and n_cols % 256 == 0 else Kind.Q4_0


def plan_tensors(shape: ModelShape, weights: str) -> list[TensorPlan]:
    """Return the tensors of a model, in the order of the file."""
    n_embd = shape.n_embd
    role = "output" if shape.is_tied else ""
    plans = [_matrix(shape, weights, "token_embd", shape.n_vocab, n_embd, role, gain=n_embd**0.5)]
    for il in range(shape.n_layer):
        plans += _attention(shape, weights, il)
        plans += _experts(shape, weights, il) if shape.n_expert else _dense(shape, weights, il)
        plans += _biases(shape, il)
    plans.append(_norm("output_norm", n_embd))
    if not shape.is_tied:
        plans.append(_matrix(shape, weights, "output", shape.n_vocab, n_embd, "output", gain=3.0))
    return plans


def _matrix(
    shape: ModelShape,
    weights: str,
    name: str,
    n_rows: int,
    n_cols: int,
    role: str = "",
    il: int = -1,
    gain: Any = 1.0,
) -> TensorPlan:
    kind = _kind(weights, role, il, shape, n_cols)
    return TensorPlan(f"{name}.weight", n_rows, n_cols, kind, gain / n_cols**0.5)


def _norm(name: str, n: int) -> TensorPlan:
    return TensorPlan(f"{name}.weight", 0, n, Kind.F32, 0.1, 1.0)


def _attention(shape: ModelShape, weights: str, il: int) -> list[TensorPlan]:
    at, n_embd = f"blk.{il}", shape.n_embd
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    # every KV head looks more or less sharply than the others: heads of a model differ, too
    gains = np.repeat(np.linspace(0.5, 2.5, shape.n_head_kv), shape.head_dim)
    plans = [
        _norm(f"{at}.attn_norm", n_embd),
        _matrix(shape, weights, f"{at}.attn_q", n_q, n_embd, gain=1.5),
        _matrix(shape, weights, f"{at}.attn_k", n_kv, n_embd, gain=gains),
        _matrix(shape, weights, f"{at}.attn_v", n_kv, n_embd, "v", il),
        _matrix(shape, weights, f"{at}.attn_output", n_embd, n_q),
        _norm(f"{at}.{'post_attention' if shape.arch == 'gpt-oss' else 'ffn'}_norm", n_embd),
    ]
    if shape.arch == "qwen3moe":
        plans += [_norm(f"{at}.attn_{x}_norm", shape.head_dim) for x in "qk"]
    if shape.arch == "gpt-oss":
        plans.append(TensorPlan(f"{at}.attn_sinks.weight", 0, shape.n_head, Kind.F32, 1.0))
    return plans


def _biases(shape: ModelShape, il: int) -> list[TensorPlan]:
    """Return those of the attention."""
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    widths = {"q": n_q, "k": n_kv, "v": n_kv, "output": shape.n_embd}
    names = {"qwen2": ("q", "k", "v"), "gpt-oss": ("q", "k", "v", "output")}.get(shape.arch, ())
    return [TensorPlan(f"blk.{il}.attn_{x}.bias", 0, widths[x], Kind.F32, 0.1) for x in names]


def _dense(shape: ModelShape, weights: str, il: int) -> list[TensorPlan]:
    at, n_embd, n_ff = f"blk.{il}", shape.n_embd, shape.n_ff
    return [
        _matrix(shape, weights, f"{at}.ffn_gate", n_ff, n_embd),
        _matrix(shape, weights, f"{at}.ffn_up", n_ff, n_embd),
        _matrix(shape, weights, f"{at}.ffn_down", n_embd, n_ff, "down", il),
    ]


def _experts(shape: ModelShape, weights: str, il: int) -> list[TensorPlan]:
    n, n_embd, n_ff = shape.n_expert, shape.n_embd, shape.n_ff
    at = f"blk.{il}.ffn"
    router = TensorPlan(f"{at}_gate_inp.weight", n, n_embd, Kind.F32, n_embd**-0.5)
    plans = [router]
    if shape.arch == "gpt-oss":
        plans.append(TensorPlan(f"{at}_gate_inp.bias", 0, n, Kind.F32, 0.1))
    for name, n_out, n_in, role in (
        ("gate", n_ff, n_embd, ""),
        ("up", n_ff, n_embd, ""),
        ("down", n_embd, n_ff, "down"),
    ):
        plan = _matrix(shape, weights, f"{at}_{name}_exps", n * n_out, n_in, role, il)
        kind = Kind.MXFP4 if shape.arch == "gpt-oss" else plan.kind
        plans.append(plan._replace(kind=kind, n_expert=n))
        if shape.arch == "gpt-oss":
            bias = TensorPlan(f"{at}_{name}_exps.bias", n, n_out, Kind.F32, 0.1, n_expert=n)
            plans.append(bias)
    return plans


# --- file ------------------------------------------------------------------------------------


def _byte_symbols() -> list[str]:
    """Return the printable symbol that byte-level BPE uses for each of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in symbols)
    symbols.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return [symbols[byte] for byte in range(256)]


#: How llama.cpp cuts text before byte-level BPE.
_SPLITS = {"qwen2": "qwen2", "qwen3moe": "qwen2", "llama": "llama-bpe", "gpt-oss": "gpt-4o"}


def _add_tokenizer(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    """Byte-level BPE: two control tokens, the 256 bytes, one merge, and names for the rest."""
    symbols = ["<s>", "</s>", *_byte_symbols(), "ĠĠ"]
    n_named = len(symbols)
    symbols += [f"[{i}]" for i in range(n_named, shape.n_vocab)]
    kinds = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (n_named - 2)
    kinds += [gguf.TokenType.UNUSED] * (shape.n_vocab - n_named)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_SPLITS[shape.arch])
    writer.add_token_list(symbols)
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(True)


def _add_parameters(writer: gguf.GGUFWriter, name: str, shape: ModelShape, weights: str) -> None:
    file_types = {
        "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
    }
    writer.add_name(f"random {name}")
    writer.add_description("Random weights, for speed and memory measurements only.")
    writer.add_file_type(file_types[weights])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    if shape.n_head * shape.head_dim != shape.n_embd:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(shape.n_expert_used)
        writer.add_expert_feed_forward_length(shape.n_ff)
    if shape.n_window:
        writer.add_sliding_window(shape.n_window)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def model_bytes(shape: ModelShape, weights: str) -> int:
    """Return the bytes of all tensors in the file, padding included."""
    return sum(_padded(plan.n_bytes) for plan in plan_tensors(shape, weights))


def write_model(
    path: Path,
    name: str,
    shape: ModelShape,
    weights: str,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a model, all of it or nothing.

    Parameters
    ----------
    path : Path
        File to write.
    name : str
        Name in its metadata.
    shape : ModelShape
        Its widths.
    weights : str
        One of `WEIGHTS`.
    seed : int
        Of the weights, 0 or larger.
    progress : callable, optional
        Gets the number of bytes written since its last call.

    Raises
    ------
    ModelFileError
        The disk is too small, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)  # which may be what fills the disk
        n_free = shutil.disk_usage(path.parent).free
        n_needed = model_bytes(shape, weights) + _SLACK_BYTES
        if n_free < n_needed:
            raise ModelFileError(
                f"{path}: needs {n_needed / 1e9:.1f} GB, the disk has {n_free / 1e9:.1f} GB free "
                "(REASONALLOC_CACHE_DIR names another folder)"
            )
        with temporary_file(path) as file:
            _write(str(file.path), name, shape, weights, seed, progress)
            file.publish()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be written: {error.strerror}") from None


def _write(
    path: str,
    name: str,
    shape: ModelShape,
    weights: str,
    seed: int,
    progress: Callable[[int], object] | None,
) -> None:
    plans = plan_tensors(shape, weights)
    with contextlib.closing(gguf.GGUFWriter(path, shape.arch)) as writer:
        _add_parameters(writer, name, shape, weights)
        _add_tokenizer(writer, shape)
        for plan in plans:
            # the shape of quantised tensors is given in bytes
            is_float = plan.kind in (Kind.F32, Kind.F16)
            dims = [*plan.n_outer, plan.n_cols if is_float else plan.row_bytes]
            dtype = np.dtype({Kind.F32: np.float32, Kind.F16: np.float16}.get(plan.kind, np.uint8))
            writer.add_tensor_info(plan.name, dims, dtype, plan.n_bytes, raw_dtype=plan.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # the writer's own write_tensor_data() wants whole tensors
        assert writer.fout is not None
        stream = writer.fout[0]
        stream.write(bytes(_padded(stream.tell()) - stream.tell()))
        for plan in plans:
            for chunk in tensor_chunks(plan, seed):
                stream.write(chunk)
                if progress is not None:
                    progress(len(chunk))
            stream.write(bytes(_padded(plan.n_bytes) - plan.n_bytes))
