"""A window for a model with a fixed KV cache: ask, watch the answer come, stop it, see the bytes.

python app.py [MODEL.gguf] [--budget N] [--selftest]

The model is decoded in a thread of its own; what it has to say goes through a queue to the window,
which looks there twenty times a second. Without MODEL it is the demo reasoner of the package.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
import tkinter
from tkinter import ttk
from typing import Any

from py_reasonalloc import ReasonAllocError, ReasonLlama
from py_reasonalloc.task.problems import SAMPLE_PROBLEM
from py_reasonalloc.task.shipped import DEMO_MODEL


class Worker(threading.Thread):
    """Opens the model, and answers what is put into `questions`; None ends it.

    `events` gets pairs: ("ready", bytes), ("piece", text), ("cache", statistics),
    ("done", stopped), ("error", text).
    """

    def __init__(self, model: str, budget: int) -> None:
        super().__init__(daemon=True)
        self.questions: queue.Queue[str | None] = queue.Queue()
        self.events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.stop = threading.Event()
        self._model, self._budget = model, budget

    def run(self) -> None:
        """Work until there is nothing more to answer."""
        try:
            with ReasonLlama(self._model, budget=self._budget, buffer=16) as llama:
                self.events.put(("ready", llama.kv_stats().kv_bytes))
                for question in iter(self.questions.get, None):
                    self._answer(llama, question)
        except ReasonAllocError as error:
            self.events.put(("error", str(error)))

    def _answer(self, llama: ReasonLlama, question: str) -> None:
        self.stop.clear()
        messages = [{"role": "user", "content": question}]
        try:
            for chunk in llama.create_chat_completion(messages, temperature=0, stream=True):
                self.events.put(("piece", chunk["choices"][0]["delta"].get("content") or ""))
                self.events.put(("cache", llama.kv_stats()))
                if self.stop.is_set():
                    break
        except ReasonAllocError as error:  # too long for the context, say: the session goes on
            self.events.put(("error", str(error)))
        self.events.put(("done", self.stop.is_set()))


class App:
    """The window."""

    def __init__(self, root: tkinter.Tk, worker: Worker) -> None:
        self.root, self.worker = root, worker
        self.cache: Any = None
        self.error = ""
        self.was_stopped: bool | None = None
        root.title("ReasonAlloc")
        root.protocol("WM_DELETE_WINDOW", self.quit)
        root.columnconfigure(0, weight=1)
        root.rowconfigure(0, weight=1)
        self.text = tkinter.Text(root, width=72, height=20, wrap="word", state="disabled")
        self.text.grid(row=0, column=0, columnspan=3, sticky="nsew", padx=8, pady=8)
        self.entry = ttk.Entry(root)
        self.entry.grid(row=1, column=0, sticky="ew", padx=8)
        self.entry.bind("<Return>", lambda _: self.ask())
        self.ask_button = ttk.Button(root, text="Ask", command=self.ask, state="disabled")
        self.ask_button.grid(row=1, column=1)
        self.stop_button = ttk.Button(root, text="Stop", command=worker.stop.set, state="disabled")
        self.stop_button.grid(row=1, column=2, padx=8)
        self.status = ttk.Label(root, text="opening the model ...")
        self.status.grid(row=2, column=0, columnspan=3, sticky="w", padx=8, pady=8)
        worker.start()
        self._poll()

    def ask(self) -> None:
        """Send what was typed to the model."""
        question = self.entry.get().strip()
        if question and str(self.ask_button["state"]) == "normal":
            self.was_stopped = None
            self._set_busy(True)
            self._write(f"> {question}\n")
            self.entry.delete(0, "end")
            self.worker.questions.put(question)

    def quit(self) -> None:
        """Stop what runs, and close when the thread has ended."""
        self.worker.stop.set()
        self.worker.questions.put(None)
        self._close()

    def _close(self) -> None:
        if self.worker.is_alive():
            self.root.after(50, self._close)
        else:
            self.root.destroy()

    def _poll(self) -> None:
        while not self.worker.events.empty():
            kind, value = self.worker.events.get()
            if kind == "ready":
                self._set_busy(False)
                self.status["text"] = f"ready; the cache has {value:,} bytes"
            elif kind == "piece":
                self._write(value)
            elif kind == "cache":
                self.cache = value
                self.status["text"] = (
                    f"{value.n_pos} tokens in a cache of {value.kv_bytes:,} bytes (the full one: "
                    f"{value.kv_bytes_full:,}); {value.n_evicted:,} entries evicted"
                )
            elif kind == "done":
                self.was_stopped = value
                self._write(" [stopped]\n\n" if value else "\n\n")
                self._set_busy(False)
            else:
                self.error = self.status["text"] = value
        self.root.after(50, self._poll)

    def _set_busy(self, is_busy: bool) -> None:
        self.ask_button["state"] = "disabled" if is_busy else "normal"
        self.stop_button["state"] = "normal" if is_busy else "disabled"

    def _write(self, text: str) -> None:
        self.text["state"] = "normal"
        self.text.insert("end", text)
        self.text["state"] = "disabled"
        self.text.see("end")


def selftest(app: App, timeout: float = 120) -> int:
    """Do what a person would: type, wait for text, press Stop, close; returns the exit code."""
    report: dict[str, Any] = {}

    def wait(what: str, is_there: Any) -> None:
        end = time.monotonic() + timeout
        while not is_there():
            if app.error or time.monotonic() > end:
                raise RuntimeError(f"{what}: {app.error or 'it took too long'}")
            app.root.update()
            time.sleep(0.01)

    try:
        wait("opening", lambda: str(app.ask_button["state"]) == "normal")
        for char in SAMPLE_PROBLEM.prompt:
            app.entry.insert("end", char)
            app.root.update()
        app.ask_button.invoke()
        wait("evictions", lambda: app.cache is not None and app.cache.n_evicted > 0)
        app.stop_button.invoke()
        wait("stopping", lambda: app.was_stopped is not None)
        report = {
            "text": app.text.get("1.0", "end"),
            "was_stopped": app.was_stopped,
            "kv_bytes": app.cache.kv_bytes,
            "n_evicted": app.cache.n_evicted,
            "status": str(app.status["text"]),
        }
    except RuntimeError as error:
        report["error"] = str(error)
    app.quit()
    app.root.mainloop()
    print(json.dumps(report))
    return 1 if "error" in report else 0


def main(arguments: list[str] | None = None) -> int:
    """Open the window."""
    parser = argparse.ArgumentParser(description="A window for a model with a fixed KV cache.")
    parser.add_argument("model", nargs="?", default=str(DEMO_MODEL), help="GGUF file")
    parser.add_argument("--budget", type=int, default=128, help="tokens per layer and KV head")
    parser.add_argument("--selftest", action="store_true", help="type, wait, stop, close")
    options = parser.parse_args(arguments)
    try:
        root = tkinter.Tk()
    except tkinter.TclError as error:
        print(f"error: no window can be opened: {error}", file=sys.stderr)
        return 1
    app = App(root, Worker(options.model, options.budget))
    if options.selftest:
        return selftest(app)
    root.mainloop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
