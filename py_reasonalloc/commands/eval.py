"""The command `reasonalloc-eval`: accuracy, length and memory of methods at given budgets.

Exit codes: 0 done; 1 the model, a file or a decode failed; 2 wrong usage; 130 stopped by Ctrl-C
(the same command goes on where it was).
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..engine.errors import ConfigError
from ..output.console import open_library, run_command, threads_option
from .eval_fidelity import fidelity_command
from .eval_report import report_command
from .eval_serve import serve_command

if TYPE_CHECKING:
    from ..eval.cases.rows import Row
    from ..eval.decode.plan import Plan
    from ..eval.decode.worker import Task
    from ..eval.remote.servers import Server
    from ..eval.results.file import ResultsFile


def _list_methods(context: click.Context, _: click.Parameter, is_wanted: bool) -> None:
    if not is_wanted:
        return
    from ..eval.cases.methods import method_summaries

    for name, text in method_summaries().items():
        click.echo(f"{name:<12} {text}")
    context.exit()


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="reasonalloc-eval report RESULTS.jsonl prints the table again; reasonalloc-eval serve "
    "MODEL lets another machine decode here; reasonalloc-eval fidelity MODEL --text FILES compares "
    "caches on plain text, without problems or answers. Each has a --help of its own.",
)
@click.argument("model", required=False)
@click.option("-o", "--output", type=click.Path(), help="Results file (JSON Lines); resumed.")
@click.option(
    "--dataset",
    metavar="math500|aime24|demo|FILE",
    help="Problems: by name, or any JSON Lines file.  [default: demo for the demo model]",
)
@click.option("--data", type=click.Path(), help="File of math500 or aime24, if it is at hand.")
@click.option("--question-field", help="Field of the question in a file of your own.")
@click.option("--answer-field", help="Field of the gold answer in a file of your own.")
@click.option("--level", type=click.IntRange(1, 3), help="Of the demo problems.  [default: 2]")
@click.option("--limit", type=click.IntRange(min=1), help="Use only so many problems.")
@click.option("--shuffle-seed", type=int, help="Shuffle the problems first.")
@click.option(
    "--template",
    type=click.Path(),
    help="File with the user message; {question} stands for the question.",
)
@click.option("--raw", is_flag=True, help="Do not apply the model's chat template.")
@click.option(
    "--methods",
    default="full,rkv,snapkv,pyramid-rkv,reasonalloc",
    show_default=True,
    help="NAME[+KEY=VALUE...][@BUDGET], separated by commas; see --list-methods.",
)
@click.option(
    "--list-methods",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_methods,
    help="Show the methods and exit.",
)
@click.option("--budgets", help="Tokens kept per layer and KV head, e.g. 128,256,512.")
@click.option(
    "--buffer", type=int, help="Tokens decoded between compressions.  [default: 128; demo: 16]"
)
@click.option("--sinks", type=int, default=4, show_default=True, help="First tokens that stay.")
@click.option("--window", type=int, default=8, show_default=True, help="Newest tokens that stay.")
@click.option(
    "--protect-prompt",
    metavar="auto|off|all|N",
    help="Prompt tokens that stay, the same in all arms; they count towards the budget. auto: as "
    "many as the results file has, else up to (smallest budget - sinks - window) / 2.  "
    "[default: auto; demo: all]",
)
@click.option("--kv-type", default="f16", show_default=True, help="Type of the cache.")
@click.option(
    "--profile",
    metavar="auto|PATH",
    default="auto",
    show_default=True,
    help="Layer profile of wave and reasonalloc. auto: the one that fits the model best, with a "
    "horizon if there is one.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens to generate.")
@click.option("--temp", type=float, help="Temperature; 0: greedy.  [default: 0.6; demo: 0]")
@click.option("--top-p", type=float, default=0.95, show_default=True, help="Nucleus sampling.")
@click.option(
    "--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Per problem."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of sampling and random eviction.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes.  [default: 1]")
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    metavar="K",
    help="Texts that are decoded side by side in one context; the rows are the same.",
)
@threads_option(" of each process")
@click.option(
    "--gpu-layers", type=click.IntRange(min=-1), default=0, help="Layers to run on a GPU; -1: all."
)
@click.option(
    "--server",
    "servers",
    type=click.Path(),
    help="File with the URLs of model servers, one a line: they decode instead of this machine.",
)
@click.option(
    "--mix-versions",
    is_flag=True,
    help="Go on in a file that another version of reasonalloc has rows in; each row names its own.",
)
@click.option("--keep-texts", is_flag=True, help="Write the model's texts into the results, too.")
@click.version_option(__version__)
def main(**arguments: Any) -> int:
    """Measure how many problems MODEL, a GGUF file, solves with each eviction method and budget.

    Every text makes a row in the results file at once: a run that was stopped, however it was,
    goes on with the same command, and more methods, budgets or problems can be added to a file.
    At the end, the table is printed: `reasonalloc-eval report` prints it again.

    MODEL may be "demo", the small model that comes with this package.
    """
    if arguments["model"] is None:
        raise ConfigError("no model: pass a GGUF file, or demo")
    if arguments["output"] is None:
        raise ConfigError("nowhere to write the results to: pass -o FILE.jsonl")
    open_library()
    from ..eval.decode.plan import make_plan
    from ..eval.remote.servers import check_servers, read_servers
    from ..eval.results.file import ResultsFile, read_results
    from .eval_report import print_report

    if arguments["parallel"] > 1 and (arguments["jobs"] or 1) > 1:
        raise ConfigError("--parallel decodes in one process: leave out --jobs")
    path = Path(arguments["output"])
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: not a regular file: results are read back from it")
    servers = None if arguments["servers"] is None else read_servers(arguments["servers"])
    there = read_results(path, keep_texts=False) if path.exists() else None
    plan = make_plan(arguments, there if there is not None and there.rows else None)
    if servers is not None:
        for option, default in (("jobs", None), ("threads", None), ("parallel", 1)):
            if arguments[option] != default:
                raise ConfigError(f"--{option} is of this machine, --server lets others decode")
        done = [row.key for row in there.rows] if there is not None else []
        check_servers(plan.job, plan.tasks(done), servers)
    n_jobs, n_parallel = arguments["jobs"] or 1, arguments["parallel"]
    methods = [arm.method for arm in plan.arms]
    is_mixed = arguments["mix_versions"]
    with ResultsFile.open(path, plan.settings, methods, plan.profiles, is_mixed) as results:
        _work(plan, results, n_jobs, n_parallel, servers)
    print_report([path])
    return 0


def _work(
    plan: Plan,
    results: ResultsFile,
    n_jobs: int,
    n_parallel: int,
    servers: list[Server] | None,
) -> None:
    """Decode what is left; each row goes into the file as it comes."""
    from .eval_progress import Progress

    tasks = plan.tasks(results.done)
    done = [row for row in results.done.values() if (row.method, row.budget) in plan.arms]
    with (
        Progress(len(tasks), len(plan.arms), done) as progress,
        closing(_solve(plan, tasks, n_jobs, n_parallel, servers)) as rows,
    ):
        for row in rows:
            results.append(row)
            progress.add(row)


def _solve(
    plan: Plan,
    tasks: Sequence[Task],
    n_jobs: int,
    n_parallel: int,
    servers: list[Server] | None,
) -> Generator[Row, None, None]:
    from ..engine.log import LogCapture
    from ..eval.decode.run import solve_here, solve_in_processes

    with LogCapture(forward=False):
        if servers is not None:
            from ..eval.remote.servers import solve_on_servers

            yield from solve_on_servers(plan.job, tasks, servers)
        elif n_parallel > 1 and tasks:
            from ..eval.decode.side_by_side import solve_side_by_side

            yield from solve_side_by_side(plan.job, tasks, n_parallel)
        elif n_jobs > 1 and len(tasks) > 1:
            yield from solve_in_processes(plan.job, tasks, min(n_jobs, len(tasks)))
        else:
            yield from solve_here(plan.job, tasks)


def run(arguments: list[str] | None = None) -> None:
    """Entry point of `reasonalloc-eval`: never returns, shows no traceback for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"report": report_command, "serve": serve_command, "fidelity": fidelity_command}
    if arguments and arguments[0] in commands:
        run_command(commands[arguments[0]], f"reasonalloc-eval {arguments[0]}", arguments[1:])
    run_command(main, "reasonalloc-eval", arguments)


if __name__ == "__main__":
    run()
