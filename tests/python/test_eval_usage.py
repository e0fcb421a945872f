"""What `reasonalloc-eval` refuses, with one line, and what may be added to a results file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from py_reasonalloc.commands import eval as cli
from py_reasonalloc.engine.errors import ConfigError
from py_reasonalloc.eval.cases import datasets
from py_reasonalloc.eval.decode import worker
from py_reasonalloc.eval.results.file import read_results
from py_reasonalloc.profile.files import profiles_folder

SHIPPED = [profiles_folder() / f"demo-reasoner{end}.json" for end in ("", "-horizon")]
N_PROBLEMS = 6


@pytest.fixture(autouse=True)
def few_problems(monkeypatch) -> None:
    """Make the demo's data set small: hundreds of prompts take their time."""
    monkeypatch.setattr(datasets, "DEMO_PROBLEMS", N_PROBLEMS)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Return a function that runs the command on the demo, with short texts, into a file."""
    path = tmp_path / "r.jsonl"

    def run(*arguments: object, limit: int = 1) -> tuple[dict, tuple]:
        command = ["demo", "-o", path, "--limit", limit, "--max-tokens", 4, "--threads", 1]
        command += arguments
        cli.main.main([str(argument) for argument in command], standalone_mode=False)
        capsys.readouterr()
        found = read_results(path)
        return found.settings, found.rows

    return run


def failure(capsys, *arguments: object) -> tuple[int, str]:
    """Run a command that fails; return its exit code and the line that it says."""
    with pytest.raises(SystemExit) as ended:
        cli.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert "Traceback" not in err
    return ended.value.code, err


# --- usage ---------------------------------------------------------------------------------------

BUDGET = ["demo", "-o", "x.jsonl", "--budgets", 128]
QUESTIONS = ["demo", "-o", "x.jsonl", "--dataset", "q.jsonl", "--methods", "rkv@96"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no model"),
        (["demo"], 2, "pass -o"),
        (["no.gguf", "-o", "x.jsonl", "--dataset", "demo", "--budgets", 99], 1, "no such file"),
        (["README.md", "-o", "x.jsonl", "--dataset", "demo", "--budgets", 99], 1, "not a GGUF"),
        (["demo", "-o", "x.jsonl", "--budgets", "64,x"], 2, "budgets = '64,x' is not a list"),
        (["demo", "-o", "x.jsonl", "--budgets", "0"], 2, "is not a list"),
        (["demo", "-o", "x.jsonl", "--budgets", "64,\u00b2"], 2, "is not a list"),
        (["demo", "-o", "x.jsonl"], 2, "rkv needs a budget"),
        (["demo", "-o", "x.jsonl", "--budgets", 40], 2, "rkv@40: budget"),
        (["demo", "-o", "x.jsonl", "--methods", "best"], 2, "method = 'best' is unknown"),
        (["demo", "-o", "x.jsonl", "--methods", "rkv@\u00b2"], 2, "is not a number of tokens"),
        ([*BUDGET, "--samples", 2], 2, "samples are all the same"),
        ([*BUDGET, "--protect-prompt", "most"], 2, "auto, off, all or"),
        ([*BUDGET, "--protect-prompt", "\u00b2"], 2, "auto, off, all or"),
        ([*BUDGET, "--methods", "full", "--protect-prompt", "most"], 2, "auto, off, all or"),
        (["demo", "-o", "no/such/folder/x.jsonl", "--budgets", 128], 2, "folder"),
        ([*BUDGET, "--profile", "none.json"], 2, "none.json"),
        ([*BUDGET, "--kv-type", "q3"], 2, "'q3' is unknown"),
        ([*BUDGET, "--dataset", "no.jsonl"], 2, "no.jsonl"),
        ([*BUDGET, "--temp", -1], 2, "temp = -1 is out of range"),
        ([*BUDGET, "--temp", "nan"], 2, "temp = nan is out of range"),
        ([*BUDGET, "--top-p", 2], 2, "--top-p = 2 is out of range"),
        ([*BUDGET, "--top-p", "nan"], 2, "--top-p = nan is out of range"),
        ([*QUESTIONS, "--level", 2], 2, "--level goes with the demo's problems"),
        ([*BUDGET, "--server", "no.txt"], 2, "no.txt"),
        ([*BUDGET, "--server", "s.txt"], 2, "rkv@999 is not evaluated: only "),
        ([*BUDGET, "--server", "one.txt"], 2, "no server does full: add a line URL"),
        ([*BUDGET, "--server", "s.txt", "--jobs", 2], 2, "--jobs is of this machine, --server"),
        (["report", "no.jsonl"], 2, "no.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    tmp_path, capsys, arguments, code, message
) -> None:
    texts = {
        "s.txt": "http://a rkv@999\n",
        "one.txt": "http://a rkv@128\n",
        "q.jsonl": '{"question": "1+1?", "answer": "2"}\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    here = [tmp_path / a if a in (*texts, "x.jsonl") else a for a in arguments]
    found, line = failure(capsys, *here)
    assert found == code and message in line
    assert {file.name for file in tmp_path.iterdir()} == set(texts)


def test_a_run_that_failed_before_its_first_text_binds_nobody(tmp_path, capsys, evaluate) -> None:
    servers, path = tmp_path / "servers.txt", tmp_path / "r.jsonl"
    servers.write_text("http://127.0.0.1:9 full\n")  # nobody listens there
    command = ["demo", "-o", path, "--methods", "full", "--seed", 7, "--server", servers]
    pytest.importorskip("httpx")
    code, line = failure(capsys, *command)
    assert code == 1 and "no server is left for full; http://127.0.0.1:9: cannot be reach" in line
    assert read_results(path).settings["seed"] == 7 and not read_results(path).rows
    settings, rows = evaluate("--methods", "full", "--seed", 8)
    assert settings["seed"] == 8 and len(rows) == 1


# --- what must be the same -----------------------------------------------------------------------


def test_other_settings_are_refused(tmp_path, capsys, make_gguf, evaluate) -> None:
    template = tmp_path / "template.txt"
    template.write_text("{question} Please!")
    base = ["--methods", "full,rkv,wave", "--budgets", 112, "--temp", 0.5, "--profile", SHIPPED[0]]
    settings, _ = evaluate(*base)
    path = tmp_path / "r.jsonl"
    before = path.read_bytes()
    command = ["demo", "-o", path, "--limit", 1, "--max-tokens", 4, *base]
    model = make_gguf(n_layer=6, n_head=4, n_head_kv=4, n_ctx_train=2048)
    for changed, name, there in (
        (["--max-tokens", 61], "max_tokens", "4"),
        (["--seed", 1], "seed", "0"),
        (["--buffer", 17], "buffer", "16"),
        (["--sinks", 5], "sinks", "4"),
        (["--window", 9], "window", "8"),
        (["--protect-prompt", "off"], "protect_prompt", "62"),
        (["--kv-type", "q8_0"], "kv_type", '"f16"'),
        (["--raw"], "raw", "false"),
        (["--template", template], "template", f'"{settings["template"]}"'),
        (["--level", 1], "dataset_fingerprint", f'"{settings["dataset_fingerprint"]}"'),
        (["--temp", 0.6], "temp", "0.5"),
        (["--top-p", 0.9], "top_p", "0.95"),
        (["--shuffle-seed", 1], "shuffle_seed", "null"),
        (["--profile", SHIPPED[1]], "profile", "[2.813"),
        (
            [model, "--dataset", "demo", "--protect-prompt", 62],
            "model",
            '"demo-reasoner-q8_0.gguf"',
        ),
    ):
        arguments = [*changed, *command[1:]] if changed[0] == model else [*command, *changed]
        code, line = failure(capsys, *arguments)
        assert code == 2 and f" {name} = {there}" in line, line
    assert path.read_bytes() == before


def test_a_profile_file_that_has_changed_is_refused(tmp_path, evaluate) -> None:
    profile = tmp_path / "p.json"
    profile.write_bytes(SHIPPED[0].read_bytes())
    own = ["--methods", f"wave+profile={profile}@96", "--profile", SHIPPED[0]]
    _, rows = evaluate(*own)
    profile.write_bytes(SHIPPED[1].read_bytes())
    with pytest.raises(ConfigError, match=f"before {profile} changed"):
        evaluate(*own, limit=2)
    assert read_results(tmp_path / "r.jsonl").rows == rows and len(rows[0].profile) == 16
    # the common profile is nobody's yet
    evaluate("--methods", "rkv@96", "--profile", SHIPPED[1])
    with pytest.raises(ConfigError, match=r"profile = \[2.813.* there, \[34"):
        evaluate("--methods", "reasonalloc@96", "--profile", SHIPPED[1])
    _, rows = evaluate("--methods", "reasonalloc@96", "--profile", SHIPPED[0])
    assert [row.profile is None for row in rows] == [False, True, False]


# --- what may be added ---------------------------------------------------------------------------


def test_budgets_can_be_added_whatever_auto_would_choose_for_them(evaluate) -> None:
    auto = ["--protect-prompt", "auto", "--methods"]
    settings, _ = evaluate(*auto, "full")
    assert settings["protect_prompt"] is None  # of no matter yet
    evaluate(*auto, "rkv@112")
    _, rows = evaluate(*auto, "rkv@96,rkv@300,full")
    assert {row.budget: row.n_protect for row in rows} == {0: None, 112: 50, 96: 50, 300: 50}
    with pytest.raises(ConfigError) as caught:
        evaluate(*auto, "snapkv@58,snapkv@112")
    message = str(caught.value)
    assert "has 50 protected prompt tokens in every arm: snapkv@58: budget" in message
    assert message.endswith("use a budget of at least 59, or another results file")
    with pytest.raises(ConfigError, match="protect_prompt = null there, 60 here"):
        evaluate("--protect-prompt", 60, "--methods", "rkv@112")
    with pytest.raises(ConfigError, match=r"^snapkv\+lambda=7@112: lambda"):
        evaluate(*auto, "snapkv+lambda=7@112")


def test_budgets_can_be_added_to_a_file_that_says_how_many_are_protected(evaluate) -> None:
    settings, _ = evaluate("--protect-prompt", "auto", "--methods", "rkv@112")
    assert settings["protect_prompt"] == 50
    _, rows = evaluate("--protect-prompt", "auto", "--methods", "rkv@200,rkv@90")
    assert {row.n_protect for row in rows} == {50}


def test_more_problems_than_the_demo_has_can_be_added(evaluate) -> None:
    evaluate("--methods", "full", limit=N_PROBLEMS)
    _, rows = evaluate("--methods", "full", limit=N_PROBLEMS + 2)
    assert len({row.problem for row in rows}) == len(rows) == N_PROBLEMS + 2


def test_a_file_from_before_rows_named_their_profile_goes_on(tmp_path, evaluate) -> None:
    arms = ["--methods", "full,rkv@96,wave@96", "--profile", SHIPPED[0]]
    evaluate(*arms)
    path = tmp_path / "r.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        del line["profile"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, rows = evaluate(*arms, limit=2)
    assert len(rows) == 6 and [row.profile is not None for row in rows] == [False] * 5 + [True]


def test_one_loaded_model_serves_all_methods(monkeypatch, evaluate) -> None:
    loads: list[Path] = []

    class Counting(worker.ReasonLlama):
        def __init__(self, model: Path, *arguments: object, **options: object) -> None:
            loads.append(model)
            super().__init__(model, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "ReasonLlama", Counting)
    methods = "full,full+kv=q8_0,rkv,snapkv,pyramid-rkv,reasonalloc+kv=q4_0"
    _, rows = evaluate("--methods", methods, "--budgets", "112,128", limit=2)
    assert len(rows) == 2 * (2 + 4 * 2) and len(loads) == 1
