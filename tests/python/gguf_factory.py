"""Tiny random-weight GGUF models for tests, made on the spot: nothing is downloaded.

How to use it::

    from gguf_factory import ModelSpec, write_gguf

    path = write_gguf(tmp_path / "m.gguf")                                 # llama, 2 layers, GQA
    path = write_gguf(tmp_path / "m.gguf", ModelSpec(arch="qwen3", n_head=4, n_head_kv=1))  # MQA
    path = write_gguf(tmp_path / "m.gguf", ModelSpec("deci", n_layer=3, n_head_kv=(4, 0, 1)))

or the ``make_gguf`` fixture of conftest.py, which writes each specification once per test run::

    def test_x(make_gguf):
        path = make_gguf(arch="qwen2", head_dim=128, n_ctx_train=512)

Same specification, same file, byte for byte. The vocabulary is the 256 bytes plus `CONTROL_TOKENS`
(byte-level BPE with one merge), so one character of ASCII text is one token and every text can be
tokenized. The rows of the output matrix that belong to control tokens and unprintable bytes are
zero: greedy decoding gives printable ASCII and never ends on its own. Weights are scaled so that
attention is neither flat nor one-hot.

`SUPPORTED` architectures have an attention cache (of gemma2 and gemma3 some layers have sliding
windows); `UNSUPPORTED` ones (recurrent state) are valid for stock llama.cpp and must be refused
with a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

SUPPORTED = ("llama", "qwen2", "qwen3", "deci", "gemma2", "gemma3")
UNSUPPORTED = ("mamba",)

BOS, EOS, USER, ASSISTANT = "<s>", "</s>", "<|user|>", "<|assistant|>"
CONTROL_TOKENS = (BOS, EOS, USER, ASSISTANT)
N_VOCAB = len(CONTROL_TOKENS) + 256 + 1  # + 1: the merge

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class ModelSpec:
    """What to write.

    Attributes
    ----------
    arch : str
        One of `SUPPORTED` or `UNSUPPORTED`.
    n_layer, n_ff : int
        Blocks, width of the feed-forward part.
    n_embd : int
        Width of the residual stream; 0: n_head * head_dim (the only choice for qwen2).
    n_head : int
        Query heads.
    n_head_kv : int or tuple of int
        KV heads (1: MQA, less than n_head: GQA, n_head: MHA). One number per layer needs arch
        "deci"; 0 stands for a layer without attention.
    head_dim : int
        Size of a K and V row. Multiples of 32 allow quantised caches.
    n_ctx_train : int
        Trained context, tokens.
    weight_type : {"f32", "f16", "q8_0"}
        Type of the matrices (vectors are f32). q8_0 wants all widths to be multiples of 32.
    chat_template : str or None
        Jinja template, or None for a model without one.
    has_tokenizer : bool
        False: the file says that it has no vocabulary.
    add_bos : bool
        tokenizer.ggml.add_bos_token.
    seed : int
        Of the weights.
    """

    arch: str = "llama"
    n_layer: int = 2
    n_embd: int = 0
    n_ff: int = 96
    n_head: int = 4
    n_head_kv: int | tuple[int, ...] = 2
    head_dim: int = 32
    n_ctx_train: int = 2048
    weight_type: str = "f32"
    chat_template: str | None = None
    has_tokenizer: bool = True
    add_bos: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arch not in SUPPORTED + UNSUPPORTED:
            raise ValueError(f"arch = {self.arch!r} is not one of {SUPPORTED + UNSUPPORTED}")
        if self.n_embd == 0:
            object.__setattr__(self, "n_embd", self.n_head * self.head_dim)

    def heads_kv(self) -> tuple[int, ...]:
        """Return n_head_kv of every layer."""
        if isinstance(self.n_head_kv, int):
            return (self.n_head_kv,) * self.n_layer
        return self.n_head_kv


def byte_symbols() -> list[str]:
    """Return the printable symbol that byte-level BPE uses for each of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in symbols)
    symbols.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return [symbols[byte] for byte in range(256)]


def silent_tokens() -> list[int]:
    """Return the tokens that greedy decoding never picks: control tokens, unprintable bytes."""
    first = len(CONTROL_TOKENS)
    return [t for t in range(N_VOCAB) if not first + 32 <= t < first + 127]


def write_gguf(path: Path | str, spec: ModelSpec | None = None) -> Path:
    """Write a model.

    Parameters
    ----------
    path : path-like
        File to write.
    spec : ModelSpec, optional
        Default: ``ModelSpec()``.

    Returns
    -------
    Path
        `path`.
    """
    spec = ModelSpec() if spec is None else spec
    writer = gguf.GGUFWriter(str(path), spec.arch)
    _add_tokenizer(writer, spec)
    _add_parameters(writer, spec)
    kind = getattr(gguf.GGMLQuantizationType, spec.weight_type.upper())
    for name, array in _tensors(spec).items():
        if array.ndim == 1 or "conv1d" in name or "ssm_a" in name:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _add_tokenizer(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    if not spec.has_tokenizer:
        writer.add_tokenizer_model("no_vocab")
        return
    symbols = [*CONTROL_TOKENS, *byte_symbols(), "ĠĠ"]
    kinds = [gguf.TokenType.CONTROL] * len(CONTROL_TOKENS) + [gguf.TokenType.NORMAL] * 257
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(symbols)
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(spec.add_bos)
    writer.add_add_eos_token(False)
    if spec.chat_template is not None:
        writer.add_chat_template(spec.chat_template)


def _add_parameters(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    writer.add_name(f"random {spec.arch}")
    writer.add_vocab_size(N_VOCAB)
    writer.add_context_length(spec.n_ctx_train)
    writer.add_embedding_length(spec.n_embd)
    writer.add_block_count(spec.n_layer)
    writer.add_layer_norm_rms_eps(1e-5)
    if spec.arch == "mamba":
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * spec.n_embd)
        writer.add_ssm_state_size(16)
        writer.add_ssm_time_step_rank(4)
        return
    writer.add_feed_forward_length(spec.n_ff)
    if isinstance(spec.n_head_kv, int):
        writer.add_head_count(spec.n_head)
        writer.add_head_count_kv(spec.n_head_kv)
    else:
        writer.add_head_count([spec.n_head if n > 0 else 0 for n in spec.n_head_kv])
        writer.add_head_count_kv(list(spec.n_head_kv))
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(10000.0)
    if spec.arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(64)
    if spec.arch == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)


def _tensors(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Name -> float32 array; matrices are [n_out, n_in]."""
    rng = np.random.default_rng(spec.seed)

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((n_out, n_in)) * (gain / n_in**0.5)).astype(np.float32)

    def vector(n: int, mean: float = 1.0) -> np.ndarray:
        return (mean + 0.1 * rng.standard_normal(n)).astype(np.float32)

    tensors = {
        "token_embd.weight": matrix(N_VOCAB, spec.n_embd, spec.n_embd**0.5),
        "output_norm.weight": vector(spec.n_embd),
    }
    if not spec.arch.startswith("gemma"):  # gemma ties the output to the embedding
        output = matrix(N_VOCAB, spec.n_embd, 3.0)
        output[silent_tokens()] = 0.0
        tensors["output.weight"] = output
    block = _mamba_block if spec.arch == "mamba" else _attention_block
    for il in range(spec.n_layer):
        for name, array in block(spec, il, matrix, vector).items():
            tensors[f"blk.{il}.{name}"] = array
    return tensors


def _attention_block(spec: ModelSpec, il: int, matrix, vector) -> dict[str, np.ndarray]:
    n_embd, n_q = spec.n_embd, spec.n_head * spec.head_dim
    n_kv = spec.heads_kv()[il] * spec.head_dim
    block = {
        "ffn_norm.weight": vector(n_embd),
        "ffn_gate.weight": matrix(spec.n_ff, n_embd),
        "ffn_up.weight": matrix(spec.n_ff, n_embd),
        "ffn_down.weight": matrix(n_embd, spec.n_ff),
    }
    if n_kv == 0:
        return block
    block |= {
        "attn_norm.weight": vector(n_embd),
        "attn_q.weight": matrix(n_q, n_embd, 1.5),
        "attn_k.weight": matrix(n_kv, n_embd, 1.5),
        "attn_v.weight": matrix(n_kv, n_embd),
        "attn_output.weight": matrix(n_embd, n_q),
    }
    if spec.arch == "qwen2":
        block["attn_q.bias"] = vector(n_q, 0.0)
        block["attn_k.bias"] = vector(n_kv, 0.0)
        block["attn_v.bias"] = vector(n_kv, 0.0)
    if spec.arch in ("qwen3", "gemma3"):
        block["attn_q_norm.weight"] = vector(spec.head_dim, 1.5)
        block["attn_k_norm.weight"] = vector(spec.head_dim)
    if spec.arch in ("gemma2", "gemma3"):
        block["post_attention_norm.weight"] = vector(n_embd)
        block["post_ffw_norm.weight"] = vector(n_embd)
    return block


def _mamba_block(spec: ModelSpec, il: int, matrix, vector) -> dict[str, np.ndarray]:
    n_embd, n_inner, n_state, n_rank = spec.n_embd, 2 * spec.n_embd, 16, 4
    return {
        "attn_norm.weight": vector(n_embd),
        "ssm_in.weight": matrix(2 * n_inner, n_embd),
        "ssm_conv1d.weight": matrix(n_inner, 4),
        "ssm_conv1d.bias": vector(n_inner, 0.0),
        "ssm_x.weight": matrix(n_rank + 2 * n_state, n_inner),
        "ssm_dt.weight": matrix(n_inner, n_rank),
        "ssm_dt.bias": vector(n_inner, 0.0),
        "ssm_a": -np.tile(np.arange(1, n_state + 1, dtype=np.float32), (n_inner, 1)),
        "ssm_d": vector(n_inner),
        "ssm_out.weight": matrix(n_embd, n_inner),
    }
