"""Grammars that a text is held to: GBNF, or made from a JSON schema."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from .errors import ConfigError
from .log import LogCapture

_ROOT = b"root"


def check_grammar(model: Any, grammar: str) -> None:
    """Raise ConfigError unless llama.cpp can parse a grammar for a model's vocabulary.

    Parameters
    ----------
    model : llama_cpp._internals.LlamaModel
        With its vocabulary loaded.
    grammar : str
        GBNF, with a rule ``root``.
    """
    from llama_cpp import llama_cpp as bindings

    text = grammar.encode("utf-8")
    with LogCapture(forward=False) as log:
        sampler = bindings.llama_sampler_init_grammar(model.vocab, text, _ROOT) if text else None
    if not sampler:
        reason = f": {log.reason()}" if log.errors else ""
        raise ConfigError(f"grammar = {_short(grammar)} cannot be parsed{reason}")
    bindings.llama_sampler_free(sampler)


def explain_grammar(model: Any, grammar: str) -> None:
    """As `check_grammar`, with the reason in the error.

    llama.cpp writes it to standard error, past its log. For commands only: the descriptor is
    another one meanwhile, for all threads.

    Raises
    ------
    ConfigError
        What llama.cpp has against the grammar.
    """
    with tempfile.TemporaryFile() as said:
        try:
            with _stderr_to(said.fileno()):
                check_grammar(model, grammar)
        except ConfigError as error:
            said.seek(0)
            lines = said.read().decode("utf-8", errors="replace").splitlines()
            if not lines:
                raise
            reason = lines[0].replace("parse: error parsing grammar: ", "")
            raise ConfigError(f"grammar = {_short(grammar)} cannot be parsed: {reason}") from error


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 40 else f"{line[:37]}...")


@contextlib.contextmanager
def _stderr_to(fd: int) -> Iterator[None]:
    kept = os.dup(2)
    try:
        os.dup2(fd, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def grammar_of_schema(schema: str) -> str:
    """Return the grammar of texts that are JSON after a schema, as the bindings make it.

    Raises
    ------
    ConfigError
        It is not JSON, no JSON schema, or needs what the bindings cannot do.
    """
    import jsonschema
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        read = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema = {_short(schema)} is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise ConfigError(f"json_schema = {_short(schema)} is not a schema: it must be an object")
    try:
        jsonschema.validators.validator_for(read).check_schema(read)
    except jsonschema.SchemaError as error:
        raise ConfigError(
            f"json_schema = {_short(schema)} is not a schema: {error.message}"
        ) from None
    try:
        return str(json_schema_to_gbnf(schema))
    except Exception as error:  # noqa: BLE001 - asserts and lookups of the converter
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"json_schema = {_short(schema)} cannot be made a grammar: {reason}"
        ) from None
