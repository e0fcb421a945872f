"""The report: figures worked out by hand, marks, the three forms of the table, and the plot."""

from __future__ import annotations

import csv
import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from py_reasonalloc.commands.eval_report import report_command
from py_reasonalloc.engine.errors import ConfigError
from py_reasonalloc.eval.cases.rows import Row
from py_reasonalloc.eval.results import file as results
from py_reasonalloc.eval.results.file import Results, ResultsFile, read_results
from py_reasonalloc.eval.results.report import make_report
from py_reasonalloc.eval.results.tables import csv_table, markdown_table, text_table
from py_reasonalloc.output.console import run_command

SETTINGS = {
    "version": "0.1.0",
    "model": "demo|1.gguf",
    "dataset": "demo",
    "temp": 0.0,
    "shuffle_seed": None,
    "profile": [0.125] * 28,
    "layers": [1, 2],
}
MIB = 1 << 20
has_matplotlib = importlib.util.find_spec("matplotlib") is not None
needs_matplotlib = pytest.mark.skipif(not has_matplotlib, reason="matplotlib is missing")


def row(method: str, budget: int, problem: int, correct: bool, **changes: Any) -> Row:
    defaults: dict[str, Any] = {
        "sample": 0,
        "seed": 1,
        "gold": "3",
        "answer": "3" if correct else None,
        "n_prompt": 20,
        "n_generated": 100,
        "stop": "end",
        "n_evicted": 500 if budget else 0,
        "n_compressions": 4 if budget else 0,
        "peak_tokens": budget + 16 if budget else 120,
        "kv_bytes": (budget + 16) * 16384 if budget else 3 * MIB,
        "decode_seconds": 2.0,
    }
    return Row(
        method=method, budget=budget, problem=str(problem), correct=correct, **defaults | changes
    )


def arm(method: str, budget: int, right: str, **changes: Any) -> list[Row]:
    """One row per letter of `right`: 1 right, 0 wrong, - no row."""
    return [
        row(method, budget, i, letter == "1", **changes)
        for i, letter in enumerate(right)
        if letter != "-"
    ]


RKV = [
    row("rkv", 64, 0, True, n_generated=100, n_evicted=1000, n_compressions=3, decode_seconds=1.0),
    row("rkv", 64, 1, True, n_generated=200, n_evicted=2000, n_compressions=5, kv_bytes=2 * MIB),
    row("rkv", 64, 2, False, n_generated=300, n_evicted=0, stop="loop", decode_seconds=4.0),
    row("rkv", 64, 3, False, n_generated=400, stop="length", n_evicted=1000, decode_seconds=3.0),
]
#: The file lists arms in the order of the run: blocks of problems, in each the arms.
ROWS = [
    *RKV[:2],
    *arm("wave", 64, "1110"),
    *RKV[2:],
    *arm("snapkv", 64, "--10"),
    *arm("rkv", 48, "1000"),
    *arm("wave", 48, "0000"),
    *arm("full", 0, "1111"),
]
#: Wilson's interval of k of n by hand, in %: 0/4, 1/4, 2/4, 3/4, 4/4 and 1/2.
W04, W14, W24, W34, W44, W12 = (
    "0.0 [0.0, 49.0]",
    "25.0 [4.6, 69.9]",
    "50.0 [15.0, 85.0]",
    "75.0 [30.1, 95.4]",
    "100.0 [51.0, 100.0]",
    "50.0 [9.5, 90.5]",
)
#: Bonett and Price's interval by hand: with b and c problems won and lost of n and
#: D = (b - c)/(n + 2) it is D -+ 1.96 sqrt(b + c + 2 - (n + 2) D^2)/(n + 2).
WON_1_OF_4, LOST_1_OF_4, WON_1_OF_2 = (
    "+25.0 [-38.3, +71.7]",
    "-25.0 [-71.7, +38.3]",
    "+50.0 [-56.3, +100.0]",
)
TABLE = [
    "method budget problems accuracy_% vs_rkv p "
    "tokens runaway cache_MiB peak evicted compr. tokens/s",
    f"full full 4 {W44} - - 100 0.0% 3 120 0 0.0 50.0",
    f"rkv 48 4 {W14} - - 100 0.0% 1 64 500 4.0 50.0",
    f"wave 48 4 {W04} {LOST_1_OF_4} 1.000 100 0.0% 1 64 500 4.0 50.0",
    f"rkv 64 4 {W24} - - 250 50.0% 2 80 1000_(1_never) 4.0 100.0",
    f"wave 64 4 {W34} {WON_1_OF_4} 1.000 100 0.0% 1.25 80 500 4.0 50.0",
    f"snapkv 64 2/4* {W12} {WON_1_OF_2} 1.000 100 0.0% 1.25 80 500 4.0 50.0",
]


def of(*rows: Row, path: str = "r.jsonl", n_dropped: int = 0, **settings: Any) -> Results:
    return Results(Path(path), {**SETTINGS, **settings}, rows, n_dropped, 0)


def table_of(text: str) -> list[str]:
    """Return the lines of the table, cells parted by one blank."""
    page = text.split("\n\n")[1].splitlines()
    assert set(page.pop(1)) == {"-", " "} and len(set(map(len, page))) == 1
    return [" ".join(cell.replace(" ", "_") for cell in re.split("  +", line)) for line in page]


def expected(lines: list[str]) -> list[str]:
    """Write the blanks inside intervals as `table_of` does."""
    return [re.sub(r" \[(\S+), (\S+)\]", r"_[\1,_\2]", line) for line in lines]


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(results, "_sync", lambda handle: None)
    path = tmp_path / "r.jsonl"
    with ResultsFile.open(path, SETTINGS) as target:
        for line in ROWS:
            target.append(line)
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as status:
        run_command(report_command, "reasonalloc-eval report", [str(a) for a in arguments])
    return int(status.value.code or 0)


# --- figures -------------------------------------------------------------------------------------


def test_the_table_by_hand() -> None:
    text = text_table(make_report([of(*ROWS)]))
    assert table_of(text) == expected(TABLE)
    head, _, notes = text.split("\n\n")
    assert head == (
        "version = 0.1.0, model = demo|1.gguf, dataset = demo, temp = 0.0, profile = [28 values], "
        "layers =\n[1, 2]"
    )
    assert "\nvs rkv, same budget: difference in points" in notes
    assert "\n*: texts are missing" in notes and "\nnever: texts in which" in notes


def test_unrounded_figures() -> None:
    report = make_report([of(*ROWS)])
    arms = {(arm.method, arm.budget): arm for arm in report.arms}
    rkv, snapkv, full = arms["rkv", 64], arms["snapkv", 64], arms["full", 0]
    assert (rkv.n_problems, rkv.n_texts, rkv.n_missing, rkv.n_never_evicted) == (4, 4, 0, 1)
    assert (rkv.mean_generated, rkv.runaway_rate, rkv.tokens_per_second) == (250, 0.5, 100)
    assert (rkv.kv_bytes, rkv.peak_tokens, rkv.mean_evicted) == (2 * MIB, 80, 1000)
    assert rkv.difference is None and full.difference is None
    assert (snapkv.n_problems, snapkv.n_missing) == (2, 2)
    assert snapkv.difference is not None and snapkv.difference.n_problems == 2
    assert full.n_never_evicted == 0
    assert (report.baseline, report.n_problems, report.notes) == ("rkv", 4, ())


def test_paired_figures_of_many_problems() -> None:
    """17 problems won and 7 lost of 50: p = 2 P(at most 7 of 24 coins), D = (17 - 7)/52."""
    rows = [
        *arm("rkv", 64, "10" * 19 + "0" * 12),
        *arm("wave", 64, "01" * 5 + "11" * 12 + "0" * 16),
    ]
    (rkv, wave) = make_report([of(*rows)]).arms
    b = sum(w.correct > r.correct for r, w in zip(rows[:50], rows[50:]))
    c = sum(w.correct < r.correct for r, w in zip(rows[:50], rows[50:]))
    assert (b, c, rkv.accuracy.value, wave.accuracy.value) == (17, 7, 0.38, 0.58)
    assert wave.difference is not None
    assert wave.difference.value == pytest.approx(0.2)
    tail = sum([1, 24, 276, 2024, 10626, 42504, 134596, 346104])  # 24 over 0 ... 7
    assert wave.difference.p == pytest.approx(2 * tail / 2**24)
    d, n = 10 / 52, 52
    half = 1.959964 * ((24 + 2) / n - d * d) ** 0.5 / n**0.5
    assert wave.difference[1:3] == pytest.approx((d - half, d + half), abs=1e-6)


def test_several_samples() -> None:
    """4 problems with 2 texts each, 3 of wave's missing: differences take the 5 that both have."""
    rows = [
        replace(line, sample=sample)
        for sample, rights in enumerate([("1100", "1110"), ("1000", "1---")])
        for method, right in zip(("rkv", "wave"), rights)
        for line in arm(method, 64, right)
    ]
    report = make_report([of(*rows)])
    rkv, wave = report.arms
    assert (rkv.n_problems, rkv.n_texts, rkv.n_missing) == (4, 8, 0)
    assert (wave.n_problems, wave.n_texts, wave.n_missing) == (4, 5, 3)
    assert (rkv.accuracy.value, wave.accuracy.value) == (3 / 8, 4 / 5)
    assert wave.difference is not None
    assert (wave.difference.value, wave.difference.n_problems) == (pytest.approx(1 / 5), 4)
    head, first, second = table_of(text_table(report))
    assert head.split()[2:4] == ["problems", "texts"]
    assert first.split()[2:4] == ["4", "8"] and second.split()[2:4] == ["4*", "5"]


@pytest.mark.parametrize(
    ("baseline", "compared"),
    [
        ("full", {"rkv@48", "wave@48", "rkv@64", "wave@64", "snapkv@64"}),
        ("wave", {"rkv@48", "rkv@64", "snapkv@64"}),
        ("rkv@48", {"full@0", "wave@48", "rkv@64", "wave@64", "snapkv@64"}),
        ("snapkv", {"rkv@64", "wave@64"}),
    ],
)
def test_other_baselines(baseline, compared) -> None:
    report = make_report([of(*ROWS)], baseline)
    found = {f"{arm.method}@{arm.budget}" for arm in report.arms if arm.difference is not None}
    assert found == compared
    text = text_table(report)
    assert f"vs {baseline}" in text and (", same budget" in text) == ("@" not in baseline)


def test_baselines_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="baseline = 'h2o' has no rows: there are rkv, wave, sna"):
        make_report([of(*ROWS)], "h2o")
    with pytest.raises(ConfigError, match="baseline = 'rkv@50' has no rows"):
        make_report([of(*ROWS)], "rkv@50")
    report = make_report([of(*arm("wave", 64, "10"), *arm("full", 0, "11"))])
    assert report.baseline is None and all(arm.difference is None for arm in report.arms)
    text = text_table(report)
    assert "no method is called rkv: --baseline METHOD" in text
    assert " vs " not in text.split("\n\n")[1] and " p " not in text.split("\n\n")[1]
    # the baseline is there, but not at this budget, or without common problems
    rows = [*arm("rkv", 48, "11"), *arm("wave", 64, "11"), *arm("wave", 48, "--11")]
    assert all(arm.difference is None for arm in make_report([of(*rows)]).arms)


def test_an_arm_that_never_evicted_is_marked() -> None:
    rows = [*arm("rkv", 64, "11", n_evicted=0), *arm("wave", 64, "11"), *arm("full", 0, "11")]
    text = text_table(make_report([of(*rows)]))
    assert " 0_(2_never) " in table_of(text)[2] and text.count("never") == 2


def test_what_a_server_does_not_tell() -> None:
    names = ("peak_tokens", "kv_bytes", "n_evicted", "n_compressions", "decode_seconds")
    rows = arm("rkv", 64, "110", **dict.fromkeys(names))
    text = text_table(make_report([of(*rows)]))
    assert table_of(text)[1].split()[-6:] == ["0.0%", "-", "-", "-", "-", "-"]
    assert "never" not in text
    known = [replace(rows[0], kv_bytes=MIB, n_evicted=0, decode_seconds=0.0), *rows[1:]]
    (line,) = make_report([of(*known)]).arms
    assert (line.kv_bytes, line.mean_evicted, line.n_never_evicted) == (MIB, 0, 1)
    assert line.tokens_per_second is None


# --- several files -------------------------------------------------------------------------------


def test_files_with_the_same_settings_are_one() -> None:
    whole = make_report([of(*ROWS)])
    parts = make_report([of(*ROWS[:7], path="a"), of(*ROWS[7:], path="b")])
    assert parts == whole


def test_files_that_do_not_go_together() -> None:
    with pytest.raises(
        ConfigError, match=r"^b: made with other settings: temp = 0.6 there, 0.0 he"
    ):
        make_report([of(*ROWS), of(path="b", temp=0.6)])
    with pytest.raises(ConfigError, match=r"^b: another file has the same rows, e.g. wave@64, pro"):
        make_report([of(*ROWS), of(ROWS[3], path="b")])
    with pytest.raises(ConfigError, match=r"^r.jsonl: there are no rows in it yet"):
        make_report([of()])


# --- forms ---------------------------------------------------------------------------------------


def test_markdown_holds_the_same(file) -> None:
    report = make_report([read_results(file)])
    lines = markdown_table(report).split("\n\n")[1].splitlines()
    rule = lines.pop(1)
    assert re.fullmatch(r"\| -+ \|( -+: \|){12}", rule)
    assert len(set(map(len, [rule, *lines]))) == 1
    cells = [[cell.strip().replace(" ", "_") for cell in line.split("|")[1:-1]] for line in lines]
    assert [" ".join(line) for line in cells] == expected(TABLE)


def test_markdown_shows_text_as_it_is() -> None:
    rows = [replace(line, method="<b>|`x`*[a](b)") for line in arm("rkv", 64, "10")]
    text = markdown_table(make_report([of(*rows)]))
    assert r"model = demo\|1.gguf" in text
    assert r"| \<b\>\|\`x\`\*\[a\](b) |" in text


def test_csv_holds_all_figures_unrounded() -> None:
    report = make_report([of(*ROWS, *arm('a,b"c', 64, "1"))])
    lines = list(csv.DictReader(csv_table(report).splitlines()))
    assert [line["method"] for line in lines] == [arm.method for arm in report.arms]
    for line, arm_ in zip(lines, report.arms):
        accuracy = [float(line[f"accuracy{end}"]) for end in ("", "_low", "_high")]
        assert accuracy == list(arm_.accuracy)
        names = ("difference", "difference_low", "difference_high", "p", "n_common_problems")
        if arm_.difference is None:
            assert all(line[name] == "" for name in (*names, "baseline"))
        else:
            assert [float(line[name]) for name in names] == list(arm_.difference)
            assert line["baseline"] == "rkv"
        for name in ("budget", "n_problems", "n_texts", "n_missing", "mean_generated",
                     "runaway_rate", "kv_bytes", "peak_tokens", "mean_evicted",
                     "mean_compressions", "n_never_evicted", "tokens_per_second"):  # fmt: skip
            assert float(line[name]) == getattr(arm_, name)


def test_nothing_strange_reaches_the_terminal() -> None:
    report = make_report([of(*ROWS, model="a\x1b[31m\nb" + "c" * 99)])
    text = text_table(report)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "c" * 60 in text and "c" * 90 not in text


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_and_writes(file, tmp_path, capsys) -> None:
    outputs = tmp_path / "t.md", tmp_path / "t.csv"
    assert run(file, "--markdown", outputs[0], "--csv", outputs[1]) == 0
    out, err = capsys.readouterr()
    report = make_report([read_results(file)])
    assert (out, err) == (text_table(report), "")
    assert outputs[0].read_text(encoding="utf-8") == markdown_table(report)
    assert outputs[1].read_bytes().decode() == csv_table(report)
    assert run(file, "--baseline", "full") == 0
    assert "vs full" in capsys.readouterr().out


def test_a_broken_last_line_is_left_out_and_told(file, capsys) -> None:
    assert run(file) == 0
    before = capsys.readouterr().out
    with file.open("ab") as stream:
        stream.write(b'{"method": "rkv", "budget": 1')
    assert run(file) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(before)
    told = " ".join(out[len(before) :].split())
    assert told == f"{file}: its last line was broken and is left out"


def test_files_with_different_profiles_are_not_mixed() -> None:
    first = of(*arm("wave+profile=p.json", 64, "10", profile="12"), *arm("rkv", 64, "10"))
    for profile, is_right in (("12", True), (None, True), ("34", False)):
        second = of(*arm("wave+profile=p.json", 48, "11", profile=profile), path="s.jsonl")
        if is_right:
            assert len(make_report([first, second]).arms) == 3
        else:
            with pytest.raises(ConfigError, match=r"s\.jsonl: .* before p\.json changed"):
                make_report([first, second])
    other = of(*arm("snapkv", 64, "11"), profile=None)
    assert len(make_report([first, other]).arms) == 3
    with pytest.raises(ConfigError, match="profile = "):
        make_report([of(*arm("wave", 64, "11")), other])


def test_errors_are_one_line(file, tmp_path, capsys) -> None:
    whole = file.read_bytes()
    damaged, other, strange = (tmp_path / name for name in ("damaged", "other", "strange"))
    damaged.write_bytes(whole.replace(b'"sample": 0', b'"sample": 0.5', 1))
    other.write_bytes(whole.replace(b"0.1.0", b"0.2.0", 1))
    empty = tmp_path / "empty"
    empty.write_bytes(whole.splitlines(keepends=True)[0])
    strange.write_bytes(b"hello\n")
    for arguments, code, message in (
        ([], 2, "Missing argument 'FILES...'"),
        ([tmp_path / "none"], 2, "none: cannot be read: No such file"),
        ([strange], 2, "strange: not a results file"),
        ([damaged], 1, "damaged: line 2: sample must be a whole number"),
        ([file, other], 2, "other: has rows of reasonalloc 0.2.0, these are of 0.1.0: use one ver"),
        ([empty], 2, "there are no rows in it yet"),
        ([file, file], 2, "another file has the same rows"),
        ([file, "--baseline", "x"], 2, "baseline = 'x' has no rows"),
        ([file, "--csv", file], 2, "would replace the results"),
        ([file, "--markdown", tmp_path / "no" / "t.md"], 2, "t.md: cannot be written"),
        ([file, "--plot", "t.gif"], 2, "must end in .png"),
    ):
        assert run(*arguments) == code, message
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert file.read_bytes() == whole


def test_rows_of_several_versions_are_named(tmp_path, capsys) -> None:
    paths = []
    for name, rows in (
        ("first", arm("rkv", 64, "11")),
        ("second", arm("snapkv", 64, "01", version="0.2.0.dev7+gabc")),
    ):
        paths.append(tmp_path / name)
        with ResultsFile.open(paths[-1], SETTINGS) as results_file:
            for one in rows:
                results_file.append(one)
    assert run(*paths) == 2
    assert "second: has rows of reasonalloc 0.2.0.dev7+gabc" in capsys.readouterr().err
    assert run(*paths, "--mix-versions") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "version = [0.1.0, 0.2.0.dev7+gabc]" in out
    assert "several versions of reasonalloc: 2 of 0.1.0, 2 of 0.2.0.dev7+gabc" in out
    assert run(paths[0]) == 0
    assert "several versions" not in capsys.readouterr().out
    with ResultsFile.open(paths[0], SETTINGS, mix_versions=True) as results_file:
        for one in arm("snapkv", 64, "01", version="0.2.0.dev7+gabc"):
            results_file.append(one)
    assert run(paths[0]) == 0  # one file was made so on purpose
    assert "2 of 0.1.0, 2 of 0.2.0.dev7+gabc" in " ".join(capsys.readouterr().out.split())


# --- the plot ------------------------------------------------------------------------------------


@needs_matplotlib
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plots(file, tmp_path, capsys, suffix) -> None:
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    assert run(file, "--plot", first) == 0
    assert run(file, "--plot", second) == 0
    capsys.readouterr()
    data = first.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert data == second.read_bytes()
    if suffix == ".svg":
        for text in ("full (3 MiB)", "rkv", "wave", "snapkv", "48", "64", "1.3", "budget (tokens"):
            assert f"<!-- {text}".encode() in data
        assert b"<dc:date>" not in data


@needs_matplotlib
def test_plots_of_many_methods_and_of_little(tmp_path) -> None:
    from py_reasonalloc.eval.results.plot import save_plot

    many = [line for i in range(13) for line in arm(f"$m_{i}", 64 + 64 * (i % 2), "1101")]
    save_plot(make_report([of(*many, *arm("full", 0, "11"), *arm("full+kv=q8_0", 0, "10"))]),
              str(tmp_path / "many.svg"))  # fmt: skip
    text = (tmp_path / "many.svg").read_text(encoding="utf-8")
    assert all(f"<!-- $m_{i} -->" in text.replace(r"\$", "$") for i in range(13))
    assert "full+kv=q8_0 (3 MiB)" in text
    without_bytes = make_report([of(*arm("rkv", 64, "10", kv_bytes=None))])
    save_plot(without_bytes, str(tmp_path / "one.svg"))
    assert "cache (MiB" not in (tmp_path / "one.svg").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="nothing to plot: no arm has a budget"):
        save_plot(make_report([of(*arm("full", 0, "10"))]), str(tmp_path / "none.svg"))
    with pytest.raises(ConfigError, match="cannot be written"):
        save_plot(without_bytes, str(tmp_path / "no" / "one.svg"))


def test_a_plot_without_matplotlib(file, monkeypatch, capsys) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    assert run(file, "--plot", "t.png") == 2
    assert "pip install matplotlib" in capsys.readouterr().err
