"""Write a checkpoint of the demo reasoner as GGUF, f16 and q8_0.

Run as ``python -m py_reasonalloc.demo.export CHECKPOINT OUT_DIR``; needs ``torch``, ``numpy``
and ``gguf``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch

from ..task.problems import ASSISTANT_TOKEN, END_TOKEN, USER_TOKEN
from ..task.vocab import BOS_ID, CONTROL_TOKENS, END_ID, FILE_NAMES, MERGES, SYMBOLS, VISIBLE_TOKENS
from .model import ModelConfig

#: Context that the metadata names (tokens). Trained chains are shorter: see MODEL_CARD.md.
N_CTX = 4096
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER_TOKEN + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    + ASSISTANT_TOKEN
    + "{{ message['content'] }}"
    + END_TOKEN
    + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT_TOKEN + "{% endif %}"
)

_BLOCK_NAMES = {
    "attn_norm.weight": "attn_norm.weight",
    "attn.q.weight": "attn_q.weight",
    "attn.q.bias": "attn_q.bias",
    "attn.k.weight": "attn_k.weight",
    "attn.k.bias": "attn_k.bias",
    "attn.v.weight": "attn_v.weight",
    "attn.v.bias": "attn_v.bias",
    "attn.o.weight": "attn_output.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "gate.weight": "ffn_gate.weight",
    "up.weight": "ffn_up.weight",
    "down.weight": "ffn_down.weight",
}


def named_tensors(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (GGUF name, float32 array) for every tensor of a model state."""
    for name, tensor in state.items():
        array = tensor.detach().float().contiguous().numpy()
        if name == "embed.weight":
            yield "token_embd.weight", array
        elif name == "norm.weight":
            yield "output_norm.weight", array
        else:
            _, index, rest = name.split(".", 2)
            yield f"blk.{index}.{_BLOCK_NAMES[rest]}", array


def add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Write the architecture's parameters, tokenizer and chat template."""
    writer.add_name("ReasonAlloc demo reasoner")
    writer.add_description(
        "Works through a list of named sums step by step. Trained from scratch; knows nothing else."
    )
    writer.add_license("MIT")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(SYMBOLS)
    kinds = {text: gguf.TokenType.CONTROL for text in CONTROL_TOKENS}
    kinds.update({text: gguf.TokenType.USER_DEFINED for text in VISIBLE_TOKENS})
    writer.add_token_types([kinds.get(symbol, gguf.TokenType.NORMAL) for symbol in SYMBOLS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(END_ID)
    writer.add_pad_token_id(END_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def export(checkpoint: Path, path: Path, kind: str) -> None:
    """Write one file.

    Parameters
    ----------
    checkpoint : Path
        File that `train` saved.
    path : Path
        GGUF to write.
    kind : str
        ``"f16"`` or ``"q8_0"``: the type of the matrices; vectors stay f32.
    """
    state = torch.load(checkpoint, weights_only=True)
    config = ModelConfig(**state["config"])
    quant = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}[kind]
    file_type = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[kind]
    writer = gguf.GGUFWriter(str(path), "qwen2")
    add_metadata(writer, config)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, array in named_tensors(state["model"]):
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def export_all(checkpoint: Path, out_dir: Path) -> None:
    """Write both files into a folder."""
    for kind, name in FILE_NAMES.items():
        export(checkpoint, out_dir / name, kind)
        print(f"wrote {out_dir / name} ({(out_dir / name).stat().st_size} bytes)")


if __name__ == "__main__":
    export_all(Path(sys.argv[1]), Path(sys.argv[2]))
