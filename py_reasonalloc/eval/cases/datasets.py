r"""Problems, and the prompts that are made of them.

`math500` and `aime24` are JSON Lines files given by path, or come from Hugging Face by name where
the package ``datasets`` is installed; `demo` is generated for the model that this package ships;
every other name is the path of a JSON Lines file. Data files are not trusted: whatever is wrong
with one is a `ConfigError` of one line that names the file and the line in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ...engine.errors import ConfigError
from ...engine.usertext import read_text
from ...task.problems import LEVEL_STEPS, generate_problem
from .rows import Problem

MATH500, AIME24, DEMO_DATASET = "math500", "aime24", "demo"

#: Seed of the demo's problems; neither its training nor the checks during it use this one.
DEMO_SEED = 40_000
DEMO_LEVEL = 2
DEMO_PROBLEMS = 500

#: A longer line is refused before it is read to its end.
MAX_LINE_BYTES = 1 << 20

PLACEHOLDER = "{question}"
#: The directive that DeepSeek-R1's usage recommendations give for mathematics.
BOXED_TEMPLATE = (
    PLACEHOLDER + "\nPlease reason step by step, and put your final answer within \\boxed{}."
)


class Fields(NamedTuple):
    """Names of a record's fields. An id or a solution that is not there is made up or left empty.

    Attributes
    ----------
    question, answer, id, solution : str
        `Problem.key` is the id, or e.g. ``line-7`` without one.
    """

    question: str = "question"
    answer: str = "answer"
    id: str = "id"
    solution: str = "solution"


class Benchmark(NamedTuple):
    """Where a data set with a name is found.

    Attributes
    ----------
    hub_name, split : str
        On Hugging Face.
    fields : Fields
        Of its records, there and in a file.
    """

    hub_name: str
    split: str
    fields: Fields


BENCHMARKS = {
    MATH500: Benchmark(
        "HuggingFaceH4/MATH-500", "test", Fields(question="problem", id="unique_id")
    ),
    AIME24: Benchmark("HuggingFaceH4/aime_2024", "train", Fields(question="problem")),
}


class Dataset(NamedTuple):
    """Problems in the order in which they are worked on, with their prompts.

    Attributes
    ----------
    name : str
        ``math500``, ``aime24``, ``demo``, or the name of a file without its folder.
    problems : tuple of Problem
    prompts : tuple of str
        User messages, one per problem.
    template : str
        They were made with.
    fingerprint : str
        See `fingerprint`; of the demo, that of its first `DEMO_PROBLEMS`.
    """

    name: str
    problems: tuple[Problem, ...]
    prompts: tuple[str, ...]
    template: str
    fingerprint: str


def load_dataset(
    dataset: str,
    *,
    path: str | os.PathLike[str] | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
    template: str | os.PathLike[str] | None = None,
    shuffle_seed: int | None = None,
    level: int = DEMO_LEVEL,
    n_problems: int | None = None,
) -> Dataset:
    """Load a data set and make its prompts.

    Parameters
    ----------
    dataset, path, question_field, answer_field
        See `load_problems`.
    template : path-like, optional
        File with the text of a prompt, see `read_template`. Default: of the data set.
    shuffle_seed : int, optional
        See `shuffled`. Default: the data set's own order.
    level : int
        Of ``demo``.
    n_problems : int, optional
        Of ``demo``: how many will be needed. At least `DEMO_PROBLEMS` are generated, so that the
        data set is the same for everybody who needs fewer.

    Raises
    ------
    ConfigError
        See `load_problems`; the template cannot be read or is not valid.
    """
    text = default_template(dataset) if template is None else read_template(template)
    problems = load_problems(
        dataset,
        path=path,
        question_field=question_field,
        answer_field=answer_field,
        n_problems=max(n_problems or 0, DEMO_PROBLEMS),
        demo_level=level,
    )
    named = problems[:DEMO_PROBLEMS] if dataset == DEMO_DATASET else problems
    digits = fingerprint(named)  # of the demo: however many are generated
    if shuffle_seed is not None:
        problems = shuffled(problems, shuffle_seed)
    file_name = os.path.basename(dataset)
    return Dataset(
        name=dataset if file_name in (*BENCHMARKS, DEMO_DATASET) else file_name,
        problems=tuple(problems),
        prompts=tuple(make_prompt(text, problem) for problem in problems),
        template=text,
        fingerprint=digits,
    )


def load_problems(
    dataset: str,
    *,
    path: str | os.PathLike[str] | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
    n_problems: int = DEMO_PROBLEMS,
    demo_level: int = DEMO_LEVEL,
) -> list[Problem]:
    """Load or generate the problems of a data set, in their order.

    Parameters
    ----------
    dataset : str
        ``math500``, ``aime24``, ``demo``, or the path of a JSON Lines file.
    path : path-like, optional
        Of the JSON Lines file that holds ``math500`` or ``aime24``. Default: Hugging Face.
    question_field, answer_field : str, optional
        Names of the fields. Default: those of the data set; ``question`` and ``answer`` in any
        other file.
    n_problems, demo_level : int
        Of ``demo``: how many; a key of `LEVEL_STEPS`.

    Returns
    -------
    list of Problem
        At least one; keys are unique.

    Raises
    ------
    ConfigError
        No such data set; its file cannot be read or is not as it should be; Hugging Face's
        ``datasets`` is missing or fails.
    """
    given = {"question": question_field, "answer": answer_field}
    renamed = {field: name for field, name in given.items() if name is not None}
    if dataset == DEMO_DATASET:
        if path is not None or renamed:
            raise ConfigError("the demo data set is generated: it has no path and no fields")
        return _demo_problems(n_problems, demo_level)
    benchmark = BENCHMARKS.get(dataset)
    fields = (benchmark.fields if benchmark else Fields())._replace(**renamed)
    if benchmark is None:
        if path is not None:
            raise ConfigError(
                f"path goes with {' or '.join(BENCHMARKS)}; '{dataset}' is taken for a path itself"
            )
        if not os.path.exists(dataset):
            names = ", ".join([*BENCHMARKS, DEMO_DATASET])
            raise ConfigError(f"{dataset}: no such file, nor a data set ({names})")
        source, records = dataset, _read_lines(dataset)
    elif path is not None:
        source, records = os.fspath(path), _read_lines(path)
    else:
        source, records = benchmark.hub_name, _fetch(dataset, benchmark)
    problems = _problems(source, records, fields)
    if not problems:
        raise ConfigError(f"{source}: holds no problem")
    return problems


def shuffled(problems: Iterable[Problem], seed: int) -> list[Problem]:
    """Return the problems in the order of a hash of seed and key.

    The order is the same on every platform and does not depend on the order they come in.
    """
    return sorted(problems, key=lambda problem: _digest(seed, problem.key))


def fingerprint(problems: Iterable[Problem]) -> str:
    """Return 16 hexadecimal digits that name these problems, in whatever order they come.

    Of a hash of keys, questions and answers: a results file that holds it is tied to its data.
    """
    return _digest(*sorted((p.key, p.question, p.answer) for p in problems))[:16]


def default_template(dataset: str) -> str:
    r"""Return a data set's prompt: the demo's is the question, all others ask for ``\boxed{}``."""
    return PLACEHOLDER if dataset == DEMO_DATASET else BOXED_TEMPLATE


def read_template(path: str | os.PathLike[str]) -> str:
    """Read a prompt template from a UTF-8 file. Newlines at its end are dropped.

    Raises
    ------
    ConfigError
        The file cannot be read, or does not have `PLACEHOLDER` exactly once.
    """
    text = read_text(path, "template", MAX_LINE_BYTES)
    count = text.count(PLACEHOLDER)
    if count != 1:
        raise ConfigError(f"{path}: a prompt has {PLACEHOLDER} once, not {count} times")
    return text


def make_prompt(template: str, problem: Problem) -> str:
    """Return the user message for a problem; no brace but the placeholder's has a meaning."""
    return template.replace(PLACEHOLDER, problem.question)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _demo_problems(n_problems: int, level: int) -> list[Problem]:
    if n_problems < 1:
        raise ConfigError(f"n_problems must be at least 1, got {n_problems}")
    if level not in LEVEL_STEPS:
        raise ConfigError(f"demo_level must be one of {sorted(LEVEL_STEPS)}, got {level}")
    drawn = (generate_problem(DEMO_SEED, index, level) for index in range(n_problems))
    return [Problem(f"demo-{p.level}-{p.index}", p.prompt, p.answer, p.chain) for p in drawn]


def _fetch(dataset: str, benchmark: Benchmark) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) from Hugging Face."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(
            f"{dataset}: give the path of its JSON Lines file, or load it by name with "
            "Hugging Face's datasets: pip install '.[datasets]' in the checkout"
        ) from None
    try:
        records = list(load_dataset(benchmark.hub_name, split=benchmark.split))
    except Exception as error:  # of the network, the hub or the library: no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{dataset}: {benchmark.hub_name} cannot be loaded from Hugging Face: {reason}"
        ) from error
    for number, record in enumerate(records, 1):
        yield f"row {number}", record


def _read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of each line of a JSON Lines file that is not blank."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                place = f"line {number}"
                if len(line) > MAX_LINE_BYTES:
                    raise ConfigError(f"{path}, {place}: longer than {MAX_LINE_BYTES} bytes")
                try:
                    text = line.decode("utf-8-sig")
                    if text.strip():
                        yield place, json.loads(text)
                except UnicodeDecodeError:
                    raise ConfigError(f"{path}, {place}: not UTF-8 text") from None
                except (ValueError, RecursionError) as error:
                    reason = getattr(error, "msg", error)  # without a line number of its own
                    raise ConfigError(f"{path}, {place}: not JSON: {reason}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _problems(source: str, records: Iterable[tuple[str, Any]], fields: Fields) -> list[Problem]:
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for place, record in records:
        where = f"{source}, {place}"
        if not isinstance(record, dict):
            raise ConfigError(f"{where}: an object with fields was expected")
        key = _text(where, record, fields.id) if fields.id in record else place.replace(" ", "-")
        if key in places:
            raise ConfigError(f"{where}: {fields.id} '{key}' is that of {places[key]} already")
        places[key] = place
        solution = record.get(fields.solution)
        problems.append(
            Problem(
                key=key,
                question=_text(where, record, fields.question),
                answer=_text(where, record, fields.answer),
                solution=solution if isinstance(solution, str) else "",
            )
        )
    return problems


def _text(where: str, record: dict[str, Any], field: str) -> str:
    """Return a field as text that is not blank; numbers are written out."""
    if field not in record:
        found = ", ".join(list(record)[:20]) or "none"
        raise ConfigError(f"{where}: no field '{field}' (fields: {found})")
    value = record[field]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: field '{field}' must be text or a number")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: field '{field}' is not valid Unicode") from None
    if not value.strip():
        raise ConfigError(f"{where}: field '{field}' is empty")
    return value.strip()
