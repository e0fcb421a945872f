"""OpenAI's answers, whole and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..session.sequences.request import TokenLogprob
from .engine import Job
from .text import Delta
from .work import Planner, Work


class Answer:
    """Puts the answer to a job together from its deltas.

    Parameters
    ----------
    planner : Planner
        Knows what tokens stand for.
    job : Job
        Whose answer it is.
    """

    def __init__(self, planner: Planner, job: Job) -> None:
        self._planner, self._job, self.work = planner, job, job.work
        self._n_left = len(self.work.choices)
        self._seen: set[int] = set()  # choices that have begun

    @property
    def is_whole(self) -> bool:
        """All choices have ended."""
        return self._n_left == 0

    # --- chunks ----------------------------------------------------------------------------------

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Return the chunks of a streamed answer that a delta makes."""
        self._n_left -= delta.finish is not None
        is_first = delta.index not in self._seen
        self._seen.add(delta.index)
        if self.work.is_chat:
            return self._chat_chunks(delta, is_first)
        text, logprobs = delta.text, self._text_logprobs(delta, is_first)
        if is_first and self.work.echo:
            text = self._prompt(delta.index) + text
        if not text and logprobs is None and delta.finish is None:
            return []
        choice = {"index": delta.index, "text": text, "logprobs": logprobs}
        return [self._chunk([{**choice, "finish_reason": delta.finish}])]

    def _chat_chunks(self, delta: Delta, is_first: bool) -> list[dict[str, Any]]:
        found = []
        tool = self.work.tool

        def add(change: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> None:
            choice = {"index": delta.index, "delta": change, "logprobs": logprobs}
            found.append(self._chunk([{**choice, "finish_reason": finish}]))

        if is_first:
            call = {"index": 0, "id": self._call_id(delta.index), "type": "function"}
            function = {"name": tool, "arguments": ""}
            begin: dict[str, Any] = {"role": "assistant", "content": None if tool else ""}
            add(begin | ({"tool_calls": [{**call, "function": function}]} if tool else {}))
        logprobs = self._chat_logprobs(delta.logprobs)
        if delta.reasoning:
            add({"reasoning_content": delta.reasoning}, logprobs)
            logprobs = None
        if delta.text and tool:
            arguments = {"arguments": delta.text}
            add({"tool_calls": [{"index": 0, "function": arguments}]}, logprobs)
        elif delta.text or logprobs is not None:
            add({"content": delta.text}, logprobs)
        if delta.finish is not None:
            add({}, None, self._finish(delta.finish))
        return found

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.work.is_chat else "text_completion"
        chunk = self._head(kind) | {"choices": choices}
        return chunk | ({"usage": None} if self.work.include_usage else {})

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a streamed answer that was asked for its usage."""
        return self._chunk([]) | {"usage": self.usage()}

    # --- a whole answer --------------------------------------------------------------------------

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        """Return the whole answer."""
        make: Callable[[int, list[Delta]], dict[str, Any]]
        make = self._chat_choice if self.work.is_chat else self._text_choice
        choices = []
        for index in range(len(self.work.choices)):
            choices.append(make(index, [delta for delta in deltas if delta.index == index]))
        kind = "chat.completion" if self.work.is_chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": self.usage()}

    def _text_choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        all_of_it = _joined(index, deltas)
        text = self._prompt(index) if self.work.echo else ""
        return {
            "index": index,
            "text": text + all_of_it.text,
            "logprobs": self._text_logprobs(all_of_it, True),
            "finish_reason": all_of_it.finish,
        }

    def _chat_choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        all_of_it = _joined(index, deltas)
        message: dict[str, Any] = {"role": "assistant", "content": all_of_it.text}
        if all_of_it.reasoning:
            message["reasoning_content"] = all_of_it.reasoning
        if self.work.tool:
            function = {"name": self.work.tool, "arguments": all_of_it.text}
            call = {"id": self._call_id(index), "type": "function", "function": function}
            message |= {"content": None, "tool_calls": [call]}
        return {
            "index": index,
            "message": message,
            "logprobs": self._chat_logprobs(all_of_it.logprobs),
            "finish_reason": self._finish(all_of_it.finish),
        }

    # --- parts -----------------------------------------------------------------------------------

    def _head(self, kind: str) -> dict[str, Any]:
        work: Work = self.work
        return {"id": work.id, "object": kind, "created": work.created, "model": work.model}

    def usage(self) -> dict[str, Any]:
        """Return how many tokens were read and generated."""
        n = sum(choice.writer.n_tokens for choice in self.work.choices)
        n_cached = min(self._job.n_cached, self.work.n_prompt)
        return {
            "prompt_tokens": self.work.n_prompt,
            "completion_tokens": n,
            "total_tokens": self.work.n_prompt + n,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }

    def _prompt(self, index: int) -> str:
        return self.work.prompts[self.work.choices[index].i_prompt]

    def _call_id(self, index: int) -> str:
        return f"call_{index}_{self.work.id.rpartition('-')[2]}"

    def _finish(self, reason: str | None) -> str | None:
        return "tool_calls" if self.work.tool and reason == "stop" else reason

    def _spell(self, token: int) -> str:
        return self._planner.piece(token).decode("utf-8", errors="replace")

    def _chat_logprobs(self, found: list[tuple[TokenLogprob, int]]) -> dict[str, Any] | None:
        if self.work.n_top is None or not found:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            piece = self._planner.piece(token)
            spelled = {"token": self._spell(token), "bytes": list(piece)}
            return spelled | {"logprob": logprob}

        content = []
        for one, _ in found:
            top = [entry(token, logprob) for token, logprob in one.top]
            content.append(entry(one.token, one.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _text_logprobs(self, delta: Delta, is_first: bool) -> dict[str, Any] | None:
        work = self.work
        if work.n_top is None:
            return None
        i_prompt, chain = work.choices[delta.index].i_prompt, self._job.chains[delta.index]
        shift = len(work.prompts[i_prompt])
        rows: list[tuple[str, float | None, dict[str, float] | None, int]] = []
        if is_first and work.echo:
            at = 0
            prompt = chain.request.prompt[work.n_added[i_prompt] :]
            known = chain.prompt_logprobs[work.n_added[i_prompt] :]
            if prompt:
                rows.append((self._spell(prompt[0]), None, None, 0))
                at = len(rows[0][0])
            for one in known:
                rows.append(self._text_row(one, at))
                at += len(rows[-1][0])
        rows += [self._text_row(one, shift + at) for one, at in delta.logprobs]
        if not rows and not is_first:
            return None
        return {
            "tokens": [row[0] for row in rows],
            "token_logprobs": [row[1] for row in rows],
            "top_logprobs": [row[2] for row in rows],
            "text_offset": [row[3] for row in rows],
        }

    def _text_row(
        self, one: TokenLogprob, at: int
    ) -> tuple[str, float | None, dict[str, float] | None, int]:
        spelled = self._spell(one.token)
        top: dict[str, float] = {}
        for token, logprob in one.top:
            top.setdefault(self._spell(token), logprob)
        return spelled, one.logprob, top | {spelled: one.logprob}, at


def _joined(index: int, deltas: list[Delta]) -> Delta:
    return Delta(
        index,
        "".join(delta.text for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        [one for delta in deltas for one in delta.logprobs],
        next((delta.finish for delta in deltas if delta.finish is not None), None),
    )
