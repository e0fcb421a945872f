"""The command `reasonalloc-eval fidelity`.

Exit codes: 0 done; 1 the model or a decode failed; 2 wrong usage; 130 stopped by Ctrl-C (with -o,
the same command goes on where it was).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..engine.errors import ConfigError
from ..output.console import open_library, threads_option

if TYPE_CHECKING:
    from ..eval.results.lines import Results
    from ..fidelity.plan import Plan
    from ..profile.files import Profile, Recommendation

#: What is compared unless something else is asked for.
METHODS, BUDGETS = "rkv,snapkv,streaming,random,pyramid-rkv", "128,256"


@click.command(
    "fidelity",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.argument("model")
@click.argument("more", nargs=-1, metavar="[TEXTS]...")
@click.option(
    "--text", multiple=True, metavar="FILE", help="Plain text, or a folder of .txt files; several."
)
@click.option("--own", is_flag=True, help="Let the model write texts with the full cache; score.")
@click.option(
    "--prompts", type=click.Path(), help="With --own: prompts, one per line.  [default: maths]"
)
@click.option(
    "--own-limit",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="With --own: use only so many prompts.",
)
@click.option(
    "--own-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="With --own: most tokens of each text.",
)
@click.option(
    "--methods",
    default=METHODS,
    show_default=True,
    help="NAME[+KEY=VALUE...][@BUDGET], separated by commas; see reasonalloc-eval --list-methods.",
)
@click.option(
    "--budgets", default=BUDGETS, show_default=True, help="Tokens kept per layer and KV head."
)
@click.option(
    "--target-kl",
    type=float,
    metavar="NATS",
    help="Name the smallest cache whose KL stays below, upper end of the interval included.",
)
@click.option("-o", "--output", type=click.Path(), help="Results file (JSON Lines); resumed.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Read only so many tokens of each file.",
)
@click.option("--baseline", help="Method that differences are to.  [default: rkv]")
@click.option(
    "--facts",
    type=click.IntRange(min=0),
    default=40,
    show_default=True,
    help="Facts to state and ask for; 0: none.",
)
@click.option(
    "--passages",
    type=click.IntRange(min=0),
    default=12,
    show_default=True,
    help="Passages to read twice; 0: none.",
)
@click.option(
    "--recall-distance",
    type=click.IntRange(min=1),
    help="Tokens between a fact and its question, and between copies.  [default: budget + buffer]",
)
@click.option(
    "--buffer", type=int, help="Tokens decoded between compressions.  [default: 128; demo: 16]"
)
@click.option("--sinks", type=int, default=4, show_default=True, help="First tokens that stay.")
@click.option("--window", type=int, default=16, show_default=True, help="Newest tokens that stay.")
@click.option(
    "--protect-prompt",
    metavar="auto|off|all|N",
    default="auto",
    show_default=True,
    help="With --own: prompt tokens that stay, the same in all arms. auto: up to (smallest budget "
    "- sinks - window) / 2.",
)
@click.option("--kv-type", default="f16", show_default=True, help="Type of the arms' caches.")
@click.option(
    "--profile",
    metavar="auto|PATH",
    default="auto",
    show_default=True,
    help="Layer profile of wave and reasonalloc.",
)
@click.option("--raw", is_flag=True, help="With --own: do not apply the model's chat template.")
@click.option(
    "--temp", type=float, default=0.0, show_default=True, help="With --own: temperature; 0: greedy."
)
@click.option("--top-p", type=float, default=0.95, show_default=True, help="With --own: nucleus.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of own texts, and of the facts' names."
)
@click.option(
    "--mix-versions",
    is_flag=True,
    help="With -o: go on in a file of another version; rows name theirs.",
)
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the tables to this file.")
@click.option("--csv", type=click.Path(path_type=Path), help="Write all figures to this file.")
@click.option("--json", type=click.Path(path_type=Path), help="The same, as one JSON object.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw KL against bytes of cache.")
@threads_option()
@click.option(
    "--gpu-layers", type=click.IntRange(min=-1), default=0, help="Layers to run on a GPU; -1: all."
)
def fidelity_command(**arguments: Any) -> int:
    """Measure how far budgeted caches take MODEL, a GGUF file, from its full cache on plain text.

    No labels and no benchmark are needed: every text is read with the full cache and with each
    method and budget, and the distributions of the next token are compared. Facts that were stated
    once are asked for later, and passages read twice.

    MODEL may be "demo", the small model that comes with this package; it writes only its own kind
    of text: --own.
    """
    open_library()
    from ..eval.results.file import read_results
    from ..fidelity.plan import make_plan
    from ..fidelity.recommend import check_target
    from ..fidelity.rows import FIDELITY
    from ..output.picture import check_picture

    arguments["text"] = (*arguments["text"], *arguments.pop("more"))
    path = None if arguments["output"] is None else Path(arguments["output"])
    targets = [arguments[name] for name in ("markdown", "csv", "json", "plot")]
    _check_targets(arguments, targets)
    if arguments["plot"] is not None:
        check_picture(str(arguments["plot"]))
    if arguments["target_kl"] is not None:
        check_target(arguments["target_kl"])
    there = None
    if path is not None and path.exists():
        there = read_results(path, form=FIDELITY)
    plan = make_plan(arguments, there if there is not None and there.rows else None)
    results = run_plan(plan, path, arguments["mix_versions"])
    report_results(plan, results, arguments)
    return 0


def _check_targets(arguments: dict[str, Any], targets: list[Path | None]) -> None:
    inputs = [arguments["model"], arguments["output"], arguments["prompts"], *arguments["text"]]
    for target in filter(None, targets):
        if not target.absolute().parent.is_dir():
            raise ConfigError(f"{target}: cannot be written: its folder does not exist")
        for name in filter(None, inputs):
            if target.exists() and Path(name).exists() and target.samefile(name):
                raise ConfigError(f"{target}: the report would replace what it is made from")


def run_plan(plan: Plan, path: Path | None, mix_versions: bool = False) -> Results:
    """Read what is left, with progress on stderr; rows go into the file as they come.

    Parameters
    ----------
    path : Path or None
        Results file; None: nothing is kept.
    mix_versions : bool
        See `ResultsFile.open`.

    Returns
    -------
    Results
        All rows of the file, or those that were made.
    """
    from ..engine.log import LogCapture
    from ..eval.results.file import ResultsFile, read_results
    from ..eval.results.lines import Results
    from ..fidelity.rows import FIDELITY, Row, RowKey
    from ..fidelity.run import check_written, measure, n_left
    from .eval_progress import Meter

    rows: dict[RowKey, Row] = {}
    methods = [arm.method for arm in plan.arms]
    file = None
    if path is not None:
        file = ResultsFile.open(path, plan.settings, methods, plan.profiles, mix_versions, FIDELITY)
        rows = dict(file.done)
    try:
        label = f"{len(plan.arms)} arm{'' if len(plan.arms) == 1 else 's'}"
        with LogCapture(forward=False), Meter(n_left(plan, rows), label, "tokens") as meter:
            for row in measure(plan, rows, meter.advance):
                if file is not None:
                    file.append(row)
                rows[row.key] = row
    finally:
        if file is not None:
            file.close()
    check_written(plan, rows)
    if path is not None:
        return read_results(path, form=FIDELITY)
    return Results(Path(plan.model), plan.settings, tuple(rows.values()), 0, 0)


def report_results(
    plan: Plan, results: Results, arguments: dict[str, Any], command: str = ""
) -> Recommendation | None:
    """Print the tables, and write them where asked; return what is recommended, if that is asked.

    Parameters
    ----------
    command : str
        See `Recommendation`.
    """
    from ..fidelity.recommend import recommend, recommendation_text
    from ..fidelity.report import make_report
    from ..fidelity.tables import csv_table, json_report, markdown_table, text_table
    from .eval_report import write_text

    report = make_report([results], arguments["baseline"], plan.notes)
    sys.stdout.write(text_table(report))
    found = None
    if arguments["target_kl"] is not None:
        found = recommend(report, plan, arguments["target_kl"], command)
        sys.stdout.write("\n" + recommendation_text(found, report, arguments["target_kl"]) + "\n")
    sys.stdout.flush()
    if arguments["markdown"] is not None:
        write_text(arguments["markdown"], markdown_table(report))
    if arguments["csv"] is not None:
        write_text(arguments["csv"], csv_table(report))
    if arguments["json"] is not None:
        write_text(arguments["json"], json_report(report, found))
    if arguments["plot"] is not None:
        from ..fidelity.plot import save_plot

        save_plot(report, str(arguments["plot"]))
    return found


def recommend_for(
    model: str, profile: Profile, options: list[str], target_kl: float, command: str
) -> Recommendation | None:
    """Measure the model's own text with all caches of a comparison, and print what came out.

    Parameters
    ----------
    model : str
        GGUF file, or "demo".
    profile : Profile
        Of the model, for methods that split the budget by one.
    options : list of str
        Of `reasonalloc-eval fidelity`.
    target_kl, command
        See `Recommendation`.
    """
    from ..fidelity.plan import make_plan

    context = fidelity_command.make_context("fidelity", [model, "--own", *options])
    arguments = {**context.params, "text": (), "profile": profile, "target_kl": target_kl}
    plan = make_plan(arguments)
    return report_results(plan, run_plan(plan, None), arguments, command)
