"""What a client (`servers`) and a server (`serve`) of evaluations say to each other.

``POST /v1/chat/completions`` and ``GET /v1/models`` are as OpenAI has them; a chat is one user
message, an answer comes whole. An evaluation puts one more field into the body, which chooses the
cache::

    "reasonalloc": {"version": "0.2.0", "fingerprint": "sha256:...",  // of package and model file
                    "n_ctx": 4096, "raw": false, "kv_type": "f16",
                    "config": null}  // the full cache, or all fields of a BudgetConfig

and finds in the answer, under the same name, what was measured: the fields `MEASURED` of `Row`. In
the list of models, version and fingerprint are found under that name. What a server reads is not
trusted: every type and range is checked.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from ... import __version__
from ...engine.errors import ConfigError, ReasonAllocError
from ...profile.files import profile_from_json
from ...session.config import MAX_TOKENS, BudgetConfig, check_float, check_int, kv_type_id
from ...session.generate import Sampling
from ..cases.methods import Setup
from ..decode.worker import Request

MODELS_PATH, CHAT_PATH = "/v1/models", "/v1/chat/completions"
#: Name of our field in requests, answers and the list of models.
FIELD = "reasonalloc"
#: What an answer's field holds: fields of `Row`.
MEASURED = (
    "n_prompt",
    "n_generated",
    "stop",
    "n_protect",
    "peak_tokens",
    "kv_bytes",
    "n_evicted",
    "n_compressions",
    "prompt_seconds",
    "decode_seconds",
    "compress_seconds",
)
#: Options of OpenAI's that are fine as long as they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_k": (0, -1),
    "min_p": (0,),
}
_KNOWN = ("model", "messages", "temperature", "top_p", "seed", "max_tokens", FIELD)
_IGNORED = ("user", "metadata", "store")


# --- what is sent --------------------------------------------------------------------------------


def setup_to_json(setup: Setup) -> dict[str, Any]:
    """Return a cache as plain values, for `setup_from_json`."""
    if setup.config is None:
        return {"kv_type": setup.kv_type, "config": None}
    config = {f.name: getattr(setup.config, f.name) for f in fields(setup.config)}
    if config["profile"] is not None:
        # what a profile recommends is no part of a cache
        config["profile"] = replace(config["profile"], recommendation=None).to_json()
    return {"kv_type": setup.kv_type, "config": config}


def setup_from_json(value: Mapping[str, Any], max_ctx: int) -> Setup:
    """Return the cache that a request asks for.

    Parameters
    ----------
    value : mapping
        With the keys of `setup_to_json`; not trusted.
    max_ctx : int
        Longest context of the model; budget + buffer may be twice as much.

    Raises
    ------
    ConfigError
        It is no cache that can be made here.
    """
    kv_type, config = value["kv_type"], value["config"]
    if not isinstance(kv_type, str):
        raise ConfigError(f"kv_type = {kv_type!r} must be a name")
    kv_type_id(kv_type)
    if config is None:
        return Setup(None, kv_type)
    _check_names("config", config, BudgetConfig.__dataclass_fields__)
    if not isinstance(config["layers"], str) or config["head_budgets"] is not None:
        raise ConfigError("config: tables of budgets are not taken from a request")
    profile = config["profile"]
    budget_config = BudgetConfig(
        **{**config, "profile": None if profile is None else profile_from_json(profile, "profile")}
    )
    if budget_config.budget + budget_config.buffer > 2 * max_ctx:
        raise ConfigError(f"budget + buffer = more than twice the model's context of {max_ctx}")
    return Setup(budget_config, kv_type)


def _check_names(what: str, value: Any, names: Collection[str]) -> None:
    """Raise ConfigError unless `value` is an object with exactly these fields."""
    if not isinstance(value, dict):
        raise ConfigError(f"{what} must be an object")
    wrong = sorted(set(names) ^ set(value))
    if wrong:
        state = "unknown" if wrong[0] in value else "missing"
        raise ConfigError(f"{what}: the field {wrong[0]!r} is {state}")


# --- what a request asks for ---------------------------------------------------------------------


class Wanted(NamedTuple):
    """A request, checked.

    Attributes
    ----------
    request : Request
        See there.
    n_ctx : int
        Context, tokens.
    is_measured : bool
        Whether the answer is to carry what was measured.
    """

    request: Request
    n_ctx: int
    is_measured: bool


class Served(NamedTuple):
    """What a server says about its model.

    Attributes
    ----------
    name : str
        Of the file.
    fingerprint : str
        See `ModelIdentity`.
    max_ctx : int
        Longest context that may be asked for.
    plain_ctx : int
        Context of requests that ask for none.
    """

    name: str
    fingerprint: str
    max_ctx: int
    plain_ctx: int


def parse_request(body: bytes, served: Served) -> Wanted:
    """Return what the body of a chat completion asks for.

    Parameters
    ----------
    body : bytes
        Not trusted.
    served : Served
        What the model is and allows.

    Raises
    ------
    ConfigError
        Not JSON, a value of the wrong type or out of its range, or an option that is not served.
    """
    try:
        return _parse_request(_parse_json(body), served)
    except ReasonAllocError:
        raise
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ConfigError(f"a value has the wrong type: {error}") from None


def _parse_json(body: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError("the body must be an object")
    return value


def _parse_request(body: dict[str, Any], served: Served) -> Wanted:
    given = {name: value for name, value in body.items() if value is not None}
    if "max_completion_tokens" in given:
        given.setdefault("max_tokens", given.pop("max_completion_tokens"))
    for name, value in given.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise ConfigError(f"{name}: this server does without; leave it out")
        if name not in (*_NEUTRAL, *_KNOWN, *_IGNORED):
            raise ConfigError(f"{name}: this server does not know that option")
    temp, top_p = given.get("temperature", 1.0), given.get("top_p", 1.0)
    seed = given.get("seed", secrets.randbelow(1 << 31))
    check_float("temperature", temp, 0.0, 100.0)
    check_float("top_p", top_p, 0.0, 1.0)
    check_int("seed", seed, 0, 2**32 - 2)
    if "max_tokens" in given:
        check_int("max_tokens", given["max_tokens"], 1, MAX_TOKENS)
    setup, n_ctx, raw = Setup(None, "f16"), served.plain_ctx, False
    if FIELD in given:
        setup, n_ctx, raw = _parse_field(given[FIELD], served)
    request = Request(
        setup=setup,
        prompt=_parse_messages(given.get("messages")),
        raw=raw,
        max_tokens=given.get("max_tokens", 0),
        sampling=Sampling(float(temp), float(top_p), seed),
    )
    return Wanted(request, n_ctx, FIELD in given)


def _parse_field(value: Any, served: Served) -> tuple[Setup, int, bool]:
    names = ("version", "fingerprint", "n_ctx", "raw", "kv_type", "config")
    if isinstance(value, dict) and value.get("version", __version__) != __version__:
        raise ConfigError(
            f"this server is reasonalloc {__version__}, the evaluation {value['version']}"
        )
    _check_names(FIELD, value, names)
    if value["fingerprint"] != served.fingerprint:
        raise ConfigError(
            f"this server has another model than the evaluation: {served.name}, "
            f"{served.fingerprint}, not {value['fingerprint']}"
        )
    check_int("n_ctx", value["n_ctx"], 1, served.max_ctx)
    if not isinstance(value["raw"], bool):
        raise ConfigError(f"raw = {value['raw']!r} must be true or false")
    return setup_from_json(value, served.max_ctx), value["n_ctx"], value["raw"]


def _parse_messages(messages: Any) -> str:
    """Return the text of the only message there may be: what a user says."""
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise ConfigError("messages must be a list of one message: {role: user, content: TEXT}")
    if messages[0].get("role") != "user":
        raise ConfigError("messages: the role of the only message must be user")
    content = messages[0].get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ConfigError("messages: content must be text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("messages: content holds half of a surrogate pair") from None
    return content
