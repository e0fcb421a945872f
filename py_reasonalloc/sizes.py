"""Cache bytes of well-known reasoners, from the engine's own formula: the table of the README.

``python -m py_reasonalloc.sizes`` prints it as Markdown.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import click

from .engine import bindings as c
from .engine.errors import ConfigError
from .session.config import KV_TYPES, kv_type_id

#: Tokens that llama.cpp computes at once.
_N_UBATCH = 512


class Shape(NamedTuple):
    """What the cache's size depends on; both K and V rows have `head_dim` values.

    n_layer counts the layers that grow. Beside them are n_layer_window layers with a sliding
    window of n_window tokens; or n_layer_state layers with a recurrent state of n_state values,
    which are f32 whatever the type of K and V.
    """

    n_layer: int
    n_head_kv: int
    head_dim: int
    n_layer_window: int = 0
    n_window: int = 0
    n_layer_state: int = 0
    n_state: int = 0


def delta_state(n_head_k: int, n_head_v: int, head_dim: int = 128, n_conv: int = 4) -> int:
    """Return the values of a gated delta net's state: a matrix for each V head, and the last inputs
    of the convolution over Q, K and V.
    """
    return head_dim * (n_head_v * head_dim + (n_conv - 1) * (2 * n_head_k + n_head_v))


#: As published in the models' configurations.
SHAPES = {
    "DeepSeek-R1-Distill-Qwen-1.5B": Shape(28, 2, 128),
    "DeepSeek-R1-Distill-Llama-8B": Shape(32, 8, 128),
    "DeepSeek-R1-Distill-Qwen-14B": Shape(48, 8, 128),
    "Qwen3-30B-A3B": Shape(48, 4, 128),
    "gpt-oss-20b": Shape(12, 8, 64, 12, 128),
    "Gemma 3 12B": Shape(8, 8, 256, 40, 1024),
    "Qwen3-Next-80B-A3B": Shape(12, 2, 256, n_layer_state=36, n_state=delta_state(16, 32)),
    "Qwen3.5-27B": Shape(16, 4, 256, n_layer_state=48, n_state=delta_state(16, 48)),
}


def full_bytes(shape: Shape, n_tokens: int, kv_type: str) -> int:
    """Bytes of K and V that `n_tokens` take in the stock cache, windows and states included.

    Windows are as llama.cpp's programs have them (swa_full off).
    """
    grown = _checked(c.ra_plan_kv_bytes_full(ctypes.byref(_native(shape, kv_type)), n_tokens))
    return grown + stock_bytes(shape, kv_type, _N_UBATCH)


def stock_bytes(shape: Shape, kv_type: str, n_ubatch: int) -> int:
    """Bytes of the layers that do not grow: sliding windows, recurrent states.

    llama.cpp gives a window the cells of a micro-batch of `n_ubatch` tokens beside it, and rounds
    up to a multiple of 256.
    """
    states = 4 * shape.n_layer_state * shape.n_state
    if shape.n_layer_window == 0:
        return states
    windows = _native(shape._replace(n_layer=shape.n_layer_window), kv_type)
    n_cells = -(-(shape.n_window + n_ubatch) // 256) * 256
    return states + _checked(c.ra_plan_kv_bytes_full(ctypes.byref(windows), n_cells))


def budget_bytes(shape: Shape, budget: int, kv_type: str) -> int:
    """Bytes of K and V that a budgeted context allocates: the default buffer; windows and states
    are included.
    """
    config = c.ra_config_default_params()
    config.budget = budget
    native = _native(shape, kv_type)
    grown = _checked(c.ra_plan_kv_bytes(ctypes.byref(native), ctypes.byref(config)))
    # with a budget, no more is computed at once than a buffer holds
    return grown + stock_bytes(shape, kv_type, min(config.buffer, _N_UBATCH))


def _native(shape: Shape, kv_type: str) -> c.ra_shape:
    kind = kv_type_id(kv_type)
    size = shape.head_dim
    return c.ra_shape(shape.n_layer, shape.n_head_kv, size, size, kind, kind)


def _checked(n_bytes: int) -> int:
    if n_bytes < 0:
        raise ConfigError(c.last_error())
    return n_bytes


def table(n_tokens: int, budgets: tuple[int, ...], kv_type: str, n_seq: int = 1) -> str:
    """Return a Markdown table, sizes in MiB, of `n_seq` sequences."""

    def mib(n_bytes: int) -> str:
        return f"{n_seq * n_bytes / 2**20:,.0f} MiB"

    times = f"{n_seq} x " if n_seq > 1 else ""
    head = ["Model", f"full, {times}{n_tokens:,} tokens", *(f"budget {b}" for b in budgets)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, shape in SHAPES.items():
        cells = [budget_bytes(shape, b, kv_type) for b in budgets]
        rows.append([name, mib(full_bytes(shape, n_tokens, kv_type)), *map(mib, cells)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@click.command()
@click.option("--tokens", default=16384, show_default=True, type=click.IntRange(1))
@click.option("--budgets", default="128,256,512,1024", show_default=True)
@click.option("--kv-type", default="f16", show_default=True, type=click.Choice(list(KV_TYPES)))
@click.option("--parallel", default=1, show_default=True, type=click.IntRange(1, 256))
def main(tokens: int, budgets: str, kv_type: str, parallel: int) -> None:
    """Print cache bytes, full against budget, for well-known reasoners."""
    try:
        values = tuple(int(b) for b in budgets.split(","))
    except ValueError:
        raise click.BadParameter(f"{budgets!r} is not a list of numbers such as 128,256") from None
    try:
        click.echo(table(tokens, values, kv_type, parallel))
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
