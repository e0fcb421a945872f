"""What a text must follow: a grammar, a JSON schema, or a tool's parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llama_cpp import LlamaGrammar, llama_grammar

from .errors import bad_value
from .schema import Tool

#: Longest grammar, characters: a step waits while one is read.
MAX_GRAMMAR = 65536
#: Deepest nesting of its parentheses: llama.cpp reads them recursively, on a thread's stack.
MAX_DEPTH = 200

# a literal, a set of characters, a comment: parentheses in them do not nest
_FLAT = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)


def asked_grammar(body: Any, tool: Tool | None) -> LlamaGrammar | None:
    """Return the grammar that a body asks for in one way or another; None: none.

    Raises
    ------
    ApiError
        It asks in two ways, or for something that cannot be read.
    """
    asked = []
    if body.grammar:
        asked.append(("grammar", body.grammar))
    if body.response_format is not None:
        asked.append(("response_format", _format_grammar(body.response_format)))
    if tool is not None:
        asked.append(("tools", _schema_grammar(tool.function.parameters, "tools")))
    asked = [(param, text) for param, text in asked if text is not None]
    if not asked:
        return None
    if len(asked) > 1:
        raise bad_value(f"{asked[0][0]} and {asked[1][0]} exclude each other", asked[1][0])
    param, text = asked[0]
    if len(text) > MAX_GRAMMAR:
        raise bad_value(f"the grammar is longer than {MAX_GRAMMAR} characters", param)
    if _depth(text) > MAX_DEPTH:
        raise bad_value(f"the grammar is nested deeper than {MAX_DEPTH}", param)
    return LlamaGrammar.from_string(text, verbose=False)


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in _FLAT.sub("", text):
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _format_grammar(asked: Mapping[str, Any]) -> str | None:
    kind = asked.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = asked.get("schema")
        json_gbnf: str = llama_grammar.JSON_GBNF
        return json_gbnf if schema is None else _schema_grammar(schema, "response_format")
    if kind == "json_schema":
        holder = asked.get("json_schema")
        schema = holder.get("schema") if isinstance(holder, dict) else None
        return _schema_grammar(schema, "response_format")
    message = "response_format.type must be text, json_object or json_schema"
    raise bad_value(message, "response_format")


def _schema_grammar(schema: Any, param: str) -> str:
    if not isinstance(schema, (dict, bool)):
        raise bad_value(f"{param} has no JSON schema", param)
    try:
        grammar: str = llama_grammar.json_schema_to_gbnf(json.dumps(schema))
    except Exception as error:  # noqa: BLE001 - the bindings raise what comes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise bad_value(f"{param}: the JSON schema cannot be read ({reason})", param) from None
    return grammar
