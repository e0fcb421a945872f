"""A conversation: turns in one session, and what of it is kept in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Protocol

from ..engine.errors import ConfigError, ContextFullError, ReasonAllocError
from ..engine.prompts import chat_template, render, tokenize
from ..engine.tempfiles import write_whole
from ..engine.usertext import path_text
from ..session.config import BudgetConfig
from ..session.generate import INTERRUPTED, STOP_STRING, Generation
from ..session.marks import Thoughts
from ..session.reason_llama import ReasonLlama
from ..session.thinking import known_tags, thinking_tags
from .allocation import settle
from .interrupts import Interrupts
from .options import RunOptions, plan_run, session_arguments
from .runner import generation_of, report_of
from .watch import Watcher, watched

#: What begins a file of a conversation, and its version.
MAGIC, FORMAT = "reasonalloc_chat", 1
#: Largest file of a conversation, bytes.
MAX_BYTES = 1 << 26
ROLES = ("system", "user", "assistant")


class Screen(Protocol):
    """Where the text of a turn goes, while it comes."""

    def piece(self, text: str) -> None:
        """Take a piece of the text, tags and all."""

    def part(self, text: str, is_thought: bool) -> None:
        """Take the same without the tags of thinking."""


class Chat:
    """A conversation with a model, its session open until `close`.

    The model's chat template makes the prompt of every turn from all messages; thinking of earlier
    turns is in it if the template leaves it there. What the new prompt has in common with what the
    session holds is not read again, as `ReasonLlama.generate` finds it. A model without a template
    gets the messages joined as they are.

    Parameters
    ----------
    options : RunOptions
        Context, cache, sampling, limits of each turn; its `system` begins the conversation.

    Attributes
    ----------
    messages : list of dict
        role and content of each; an answer has its thinking in it, tags and all.
    report : dict or None
        Of the last turn: see `run.runner.run`, and `say`.

    Raises
    ------
    ReasonAllocError
        See `plan_run` and `ReasonLlama`.
    """

    def __init__(self, options: RunOptions) -> None:
        # a first message, to see that the template takes it before the weights are loaded
        plan = plan_run(dataclasses.replace(options, max_tokens=0), "hello")
        self._plan = dataclasses.replace(plan, prompt=())
        self.options = settle(options, self._plan)
        self.report: dict[str, Any] | None = None
        self._open()
        self.has_template = not options.raw and chat_template(self.llama._model) is not None
        self.messages: list[dict[str, str]] = []
        self._forget()
        self._tags = known_tags(self.llama._model)
        if options.think is not None:
            self._tags = thinking_tags(self.llama._model, options.think)
        self._spelled = frozenset(
            token
            for tag in self._tags or ()
            for token in tokenize(self.llama._model, tag.encode(), add_special=False)
        )

    def _open(self) -> None:
        arguments = session_arguments(self.options, self._plan, self._plan.n_ctx)
        self.llama = ReasonLlama(**arguments)

    def _forget(self) -> None:
        self.messages = []
        if self.options.system is not None:
            self.messages.append({"role": "system", "content": self.options.system})
        self._rendered, self._known = b"", ()

    _rendered: bytes
    _known: tuple[int, ...]

    @property
    def n_turns(self) -> int:
        """Answers so far."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def say(self, text: str, screen: Screen, watcher: Watcher | None = None) -> dict[str, Any]:
        """Have the model answer a message.

        Ctrl-C ends the answer, which is kept as far as it came; the message is forgotten if that is
        nowhere.

        Returns
        -------
        dict
            The report of `run.runner.run`, n_prompt being the whole conversation's, and: `thinking`
            and `answer`, the text without tags; `n_read`, tokens of the prompt that were not in the
            cache.

        Raises
        ------
        ConfigError
            The message is empty, or the chat template fails.
        ContextFullError
            The conversation does not fit into the context.
        BudgetError
            The budget cannot hold the protected prompt.
        ComputeError
            A decode failed. The conversation is as it was before.
        """
        if not text.strip():
            raise ConfigError("the message is empty")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, rendered = self._encode(messages)
        if len(prompt) >= self.llama.n_ctx():
            raise ContextFullError(
                f"the conversation has {len(prompt)} tokens, but the context ends at "
                f"{self.llama.n_ctx()}: /clear begins a new one"
            )
        self._fix_protection(len(prompt))
        generation = generation_of(self.options, self.llama, prompt, self._spelled)
        opened = bool(self._tags) and rendered.rstrip().endswith((self._tags or ("",))[0].encode())
        thoughts = Thoughts(self._tags, opened)
        n_before, n_read, pieces = self.llama.n_evaluated, 0, []
        with Interrupts() as interrupts, watched(self.llama, watcher):
            interrupts.stop = generation.interrupt
            interrupts.is_raising = True  # a prompt being read has no next token to wait for
            try:
                for piece in generation:
                    if interrupts.is_raising:
                        n_read = self.llama.n_evaluated - n_before
                        interrupts.is_raising = False
                    pieces.append(piece)
                    screen.piece(piece)
                    for part in thoughts.feed(piece):
                        screen.part(*part)
                    if watcher is not None:
                        watcher.step()
            except KeyboardInterrupt:
                generation.interrupt()
            interrupts.is_raising = False
            for part in thoughts.rest():
                screen.part(*part)
        said = "".join(pieces)
        if generation.tokens or generation.stop_reason != INTERRUPTED:
            self.messages = [*messages, {"role": "assistant", "content": said}]
            self._remember(rendered, prompt, generation, said)
        plan = dataclasses.replace(self._plan, prompt=tuple(prompt))
        self.report = report_of(self.options, plan, generation, said)
        self.report |= {"thinking": thoughts.thinking, "answer": thoughts.answer, "n_read": n_read}
        return self.report

    def _encode(self, messages: list[dict[str, str]]) -> tuple[list[int], bytes]:
        """Return tokens and text of a prompt.

        Where the text goes on from what the model was given and wrote, so do the tokens: written
        by a model, a text is not always cut into tokens as a tokenizer would cut it.
        """
        model, options = self.llama._model, self.options
        rendered = render(model, messages, options.raw, options.template_variables)
        if self._known and rendered.startswith(self._rendered):
            rest = rendered[len(self._rendered) :]
            tokens = tokenize(model, rest, add_special=False)
            pieces = self.llama.pieces(special=True)
            if b"".join(pieces[token] for token in tokens) == rest:
                return [*self._known, *tokens], rendered
        return tokenize(model, rendered, add_special=True), rendered

    def _fix_protection(self, n_prompt: int) -> None:
        """Protect what "auto" protects of the first prompt, and not more of later ones.

        A cache that was made under another protection is read anew where a profile splits it.
        """
        config = self.llama.config
        if config is not None and config.protect_prompt == "auto":
            n_protect = config.n_protect(n_prompt)
            self.llama.config = dataclasses.replace(config, protect_prompt=n_protect)

    def _remember(
        self, rendered: bytes, prompt: list[int], generation: Generation, said: str
    ) -> None:
        self._rendered, self._known = b"", ()
        if generation.stop_reason != STOP_STRING:  # else there are tokens that are not in the text
            self._rendered = rendered + said.encode("utf-8")
            self._known = (*prompt, *generation.tokens)

    # --- between turns ---------------------------------------------------------------------------

    def clear(self) -> None:
        """Begin anew: the system message, if there is one, and an empty cache."""
        self._forget()
        self.report = None
        self.llama.clear()
        self.llama.config = self.options.config

    def set_budget(self, budget: int) -> None:
        """Go on with another budget; the next turn reads the conversation anew.

        Raises
        ------
        ConfigError
            The budget is out of range, or fixed by a table of layers or a recommendation.
        BudgetError
            It is too small for sinks, window and protected prompt.
        """
        config = self.options.config
        if config is not None and not isinstance(config.layers, str):
            raise ConfigError("--layers gives the budget of every layer: it cannot be changed here")
        if config is None:
            config = BudgetConfig(budget=budget, protect_prompt="auto")
        else:
            config = dataclasses.replace(config, budget=budget)
        try:
            self.llama.reconfigure(config)
        except ReasonAllocError:
            self.llama.close()  # it may be: no context could be made
            self._open()
            raise
        self.options = dataclasses.replace(self.options, config=config, recommended_by=None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a file, as JSON.

        Raises
        ------
        ConfigError
            It cannot be written.
        """
        model = path_text(Path(self.options.model).name)
        content = {MAGIC: FORMAT, "model": model, "messages": self.messages}
        data = json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass")
        try:
            write_whole(Path(path), data + b"\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{path_text(path)}: cannot be written: {reason}") from None

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with the conversation of a file, whichever model it was with.

        The next turn reads it anew. Its system message, or that it has none, replaces ours.

        Raises
        ------
        ConfigError
            The file is no conversation, or the chat template does not take it. Nothing has changed.
        """
        messages = read_messages(path)
        render(self.llama._model, messages, self.options.raw, self.options.template_variables)
        self.clear()
        self.messages = messages

    def close(self) -> None:
        """Close the session."""
        self.llama.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            self.close()


def read_messages(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Return the messages of a file that `Chat.save` wrote.

    Raises
    ------
    ConfigError
        It cannot be read, or is something else.
    """
    name = path_text(path)
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        content = json.loads(data.decode("utf-8")) if len(data) <= MAX_BYTES else None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or MAGIC not in content:
        raise ConfigError(f"{name}: not a conversation that /save wrote")
    if content[MAGIC] != FORMAT:
        raise ConfigError(f"{name}: format {content[MAGIC]!r} is not known here, only {FORMAT}")
    messages = content.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ConfigError(f"{name}: the conversation is damaged")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ROLES
        and isinstance(value.get("content"), str)
    )
