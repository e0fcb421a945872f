"""reasonalloc.h in ctypes: the same names, structs and argument order, and nothing else.

Importing this module loads the library. Structs are compared with the library's own sizes.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint64,
    c_void_p,
)
from typing import Any

from .errors import error_from_status
from .library import check_struct_sizes, load_library

RA_STATUS_OK = 0

_lib = load_library()


class ra_config(ctypes.Structure):  # noqa: N801
    """See reasonalloc.h."""

    _fields_ = (
        ("size", c_size_t),
        ("budget", c_int32),
        ("buffer", c_int32),
        ("n_sink", c_int32),
        ("n_window", c_int32),
        ("n_draft", c_int32),
        ("n_protect", c_int32),
        ("budget_swa", c_int32),
        ("policy", c_char_p),
        ("lambda_", c_float),
        ("sim_threshold", c_float),
        ("pool_kernel", c_int32),
        ("ema", c_float),
        ("decay", c_float),
        ("n_query", c_int32),
        ("seed", c_uint64),
        ("merge", c_int32),
        ("bias_max", c_float),
        ("value_guard", c_float),
        ("n_guard", c_int32),
        ("layer_budgets", POINTER(c_int32)),
        ("n_layer_budgets", c_size_t),
        ("head_budgets", POINTER(c_int32)),
        ("n_head_budgets", c_size_t),
        ("layer_alloc", c_char_p),
        ("head_alloc", c_char_p),
        ("gamma", c_double),
        ("clip_lo", c_double),
        ("clip_hi", c_double),
        ("mu", c_double),
        ("pyramid_beta", c_double),
        ("layer_demand", POINTER(c_double)),
        ("n_layer_demand", c_size_t),
        ("head_error", POINTER(c_double)),
        ("n_head_error", c_size_t),
        ("error_grid", POINTER(c_int32)),
        ("n_error_grid", c_size_t),
        ("error_base", c_int32),
        ("error_least", c_double),
        ("centres", POINTER(c_float)),
        ("n_centres", c_size_t),
        ("attention", c_char_p),
    )


class ra_stats(ctypes.Structure):  # noqa: N801
    """See reasonalloc.h."""

    _fields_ = (
        ("size", c_size_t),
        ("n_layer", c_int32),
        ("n_head_kv_max", c_int32),
        ("budget", c_int32),
        ("buffer", c_int32),
        ("n_seq", c_int32),
        ("n_pos", c_int32),
        ("peak_tokens", c_int32),
        ("kv_bytes", c_int64),
        ("window_bytes", c_int64),
        ("scratch_bytes", c_int64),
        ("kv_bytes_full", c_int64),
        ("n_evicted", c_int64),
        ("n_entries", c_int64),
        ("n_compressions", c_int64),
        ("compress_us", c_int64),
        ("n_tokens_total", c_int64),
        ("stock_bytes", c_int64),
    )


class ra_head_stats(ctypes.Structure):  # noqa: N801
    """See reasonalloc.h."""

    _fields_ = (
        ("size", c_size_t),
        ("budget", c_int32),
        ("capacity", c_int32),
        ("used", c_int32),
        ("offset", c_int32),
        ("n_evicted", c_int64),
        ("row_bytes", c_int64),
    )


class ra_shape(ctypes.Structure):  # noqa: N801
    """See reasonalloc.h."""

    _fields_ = (
        ("n_layer", c_int32),
        ("n_head_kv", c_int32),
        ("head_dim_k", c_int32),
        ("head_dim_v", c_int32),
        ("type_k", c_int32),
        ("type_v", c_int32),
    )


class ra_robustify_params(ctypes.Structure):  # noqa: N801
    """See reasonalloc.h."""

    _fields_ = (("gamma", c_double), ("lo", c_double), ("hi", c_double))


class ra_rope(ctypes.Structure):  # noqa: N801
    """See reasonalloc.h."""

    _fields_ = (
        ("n_rot", c_int32),
        ("offset", c_int32),
        ("is_neox", c_int32),
        ("freq", POINTER(c_float)),
    )


class ra_head_arrays(ctypes.Structure):  # noqa: N801
    """See reasonalloc.h."""

    _fields_ = (
        ("size", c_size_t),
        ("il", c_int32),
        ("ih", c_int32),
        ("n_kv", c_int32),
        ("n_group", c_int32),
        ("n_obs", c_int32),
        ("head_dim_k", c_int32),
        ("head_dim_v", c_int32),
        ("kq_scale", c_float),
        ("k", POINTER(c_float)),
        ("v", POINTER(c_float)),
        ("q", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("bias", POINTER(c_float)),
        ("state", POINTER(c_float)),
        ("rope", POINTER(ra_rope)),
        ("centres", POINTER(c_float)),
        ("n_centres", c_size_t),
    )


class ra_arch(ctypes.Structure):  # noqa: N801
    """See reasonalloc_tools.h."""

    _fields_ = (
        ("size", c_size_t),
        ("name", ctypes.c_char_p),
        ("layers", ctypes.c_char_p),
        ("why_not", ctypes.c_char_p),
    )


class ra_trace_event(ctypes.Structure):  # noqa: N801
    """See reasonalloc.h."""

    _fields_ = (
        ("seq_id", c_int32),
        ("i_compression", c_int64),
        ("n_pos", c_int32),
        ("il", c_int32),
        ("n_head_kv", c_int32),
        ("n_kv", POINTER(c_int32)),
        ("pos", POINTER(c_int32)),
        ("score", POINTER(c_float)),
        ("keep", POINTER(c_uint8)),
        ("budgets", POINTER(c_int32)),
        ("target", POINTER(c_int32)),
        ("share", POINTER(c_float)),
        ("bias", POINTER(c_float)),
    )


check_struct_sizes(
    _lib,
    {
        "ra_sizeof_config": ra_config,
        "ra_sizeof_stats": ra_stats,
        "ra_sizeof_head_stats": ra_head_stats,
        "ra_sizeof_head_arrays": ra_head_arrays,
        "ra_sizeof_trace_event": ra_trace_event,
    },
)

# void (*)(user, event)
ra_trace_cb = ctypes.CFUNCTYPE(None, c_void_p, POINTER(ra_trace_event))


def _bind(name: str, argtypes: list[Any], restype: Any) -> Any:
    function = getattr(_lib, name)
    function.argtypes = argtypes
    function.restype = restype
    return function


_context = c_void_p  # struct llama_context *
_model = c_void_p  # struct llama_model *
_int32s = POINTER(c_int32)
_int64s = POINTER(c_int64)
_floats = POINTER(c_float)
_status = c_int32

ra_abi_version = _bind("ra_abi_version", [], c_int32)
ra_version = _bind("ra_version", [], c_char_p)
ra_status_name = _bind("ra_status_name", [_status], c_char_p)
ra_last_error = _bind("ra_last_error", [], c_char_p)

ra_config_default_params = _bind("ra_config_default_params", [], ra_config)
ra_config_check = _bind("ra_config_check", [POINTER(ra_config)], _status)
ra_configure_next = _bind("ra_configure_next", [POINTER(ra_config)], _status)
ra_model_supported = _bind("ra_model_supported", [_model, c_int32, c_int32], _status)

ra_is_attached = _bind("ra_is_attached", [_context], c_int32)
ra_n_seq = _bind("ra_n_seq", [_context], c_int32)
ra_set_protect = _bind("ra_set_protect", [_context, c_int32, c_int32], _status)
ra_set_head_budgets = _bind(
    "ra_set_head_budgets", [_context, c_int32, c_int32, _int32s, c_size_t], _status
)
ra_compress = _bind("ra_compress", [_context, c_int32], _status)
ra_room = _bind("ra_room", [_context, c_int32], c_int32)

ra_stats_get = _bind("ra_stats_get", [_context, c_int32, POINTER(ra_stats)], _status)
ra_head_stats_get = _bind(
    "ra_head_stats_get", [_context, c_int32, c_int32, c_int32, POINTER(ra_head_stats)], _status
)
ra_n_head_kv = _bind("ra_n_head_kv", [_context, c_int32], c_int32)
ra_kept_positions = _bind(
    "ra_kept_positions", [_context, c_int32, c_int32, c_int32, _int32s, c_int32], c_int32
)
ra_row_bytes = _bind("ra_row_bytes", [_context], c_int64)
ra_set_trace = _bind("ra_set_trace", [_context, ra_trace_cb, c_void_p], _status)

ra_memory_breakdown = _bind("ra_memory_breakdown", [_context, _int64s, _int64s, _int64s], c_int32)
ra_planned_scratch_bytes = _bind("ra_planned_scratch_bytes", [_context], c_int64)
ra_plan_kv_bytes = _bind("ra_plan_kv_bytes", [POINTER(ra_shape), POINTER(ra_config)], c_int64)
ra_plan_kv_bytes_full = _bind("ra_plan_kv_bytes_full", [POINTER(ra_shape), c_int64], c_int64)

ra_policy_count = _bind("ra_policy_count", [], c_int32)
ra_policy_name = _bind("ra_policy_name", [c_int32], c_char_p)
ra_policy_summary = _bind("ra_policy_summary", [c_int32], c_char_p)
ra_policy_needs_centres = _bind("ra_policy_needs_centres", [c_int32], c_int32)
ra_read_queries = _bind(
    "ra_read_queries",
    [c_void_p, POINTER(ra_rope), _floats, c_int32, _floats, c_int64],
    _status,
)
ra_alloc_count = _bind("ra_alloc_count", [c_int32], c_int32)
ra_alloc_name = _bind("ra_alloc_name", [c_int32, c_int32], c_char_p)

ra_policy_n_state = _bind("ra_policy_n_state", [c_int32], c_int32)
ra_policy_score = _bind(
    "ra_policy_score",
    [POINTER(ra_config), POINTER(ra_head_arrays), _floats, _floats, _floats],
    _status,
)
ra_merge_head = _bind(
    "ra_merge_head",
    [
        POINTER(ra_config),
        POINTER(ra_head_arrays),
        POINTER(c_uint8),
        POINTER(c_uint8),
        _floats,
        _int32s,
        _floats,
        _floats,
    ],
    _status,
)
ra_robustify = _bind(
    "ra_robustify",
    [POINTER(ra_robustify_params), c_int32, POINTER(c_double), c_int64, c_int32, _int32s],
    _status,
)
ra_alloc_layers_run = _bind("ra_alloc_layers_run", [POINTER(ra_config), c_int32, _int32s], _status)
ra_arch_count = _bind("ra_arch_count", [], c_int32)
ra_arch_get = _bind("ra_arch_get", [c_int32, ctypes.POINTER(ra_arch)], _status)
ra_alloc_heads_run = _bind(
    "ra_alloc_heads_run",
    [POINTER(ra_config), c_int32, _int32s, _floats, _int32s, _int32s],
    _status,
)
ra_select_keep = _bind("ra_select_keep", [c_int32, _floats, c_int32, POINTER(c_uint8)], _status)


def last_error() -> str:
    """Return ra_last_error() as text."""
    text: bytes = ra_last_error()
    return text.decode("utf-8", errors="replace")


def check(status: int) -> None:
    """Raise the typed exception of a status other than RA_STATUS_OK."""
    if status != RA_STATUS_OK:
        raise error_from_status(status, last_error())
