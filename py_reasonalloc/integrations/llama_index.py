"""llama-index's llama.cpp model over a session that you open: `ReasonLLM`."""

from __future__ import annotations

from typing import Any

from llama_index.llms.llama_cpp import LlamaCPP

from ..session.reason_llama import ReasonLlama


class ReasonLLM(LlamaCPP):
    """`llama_index.llms.llama_cpp.LlamaCPP` around an open `ReasonLlama`.

    Parameters
    ----------
    llama : ReasonLlama
        The session; it stays yours to close.
    temperature : float
        Of sampling, 0 to 1.
    max_new_tokens : int
        Most tokens of an answer.
    generate_kwargs : dict, optional
        More options of ``ReasonLlama.create_completion``.
    **kwargs
        Of `LlamaCPP`: messages_to_prompt, completion_to_prompt, callback_manager, ...
    """

    def __init__(
        self,
        llama: ReasonLlama,
        temperature: float = 0.1,
        max_new_tokens: int = 256,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(llama, ReasonLlama):
            raise ValueError("llama must be a ReasonLlama: ReasonLlama(path, budget=...)")
        options = {"temperature": temperature, "max_tokens": max_new_tokens}
        # past the constructor of LlamaCPP, which opens a model of its own
        super(LlamaCPP, self).__init__(
            model_path=llama.model_path,
            model_url=None,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            context_window=llama.n_ctx(),
            generate_kwargs={**(generate_kwargs or {}), **options},
            verbose=False,
            **kwargs,
        )
        self._model = llama
