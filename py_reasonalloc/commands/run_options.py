"""The options of `reasonalloc-run`, in groups; what they ask for: `run_request`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..output.console import threads_option


def _options(*decorators: Any) -> Callable[[Any], Any]:
    """Return a decorator that adds options to a command, in this order."""

    def add(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


def _list_policies(context: click.Context, _: click.Parameter, is_wanted: bool) -> None:
    if not is_wanted:
        return
    from ..session.config import policy_summaries

    for name, text in policy_summaries().items():
        click.echo(f"{name:<12} {text}")
    context.exit()


prompt_options = _options(
    click.option("-p", "--prompt", help="What to ask."),
    click.option(
        "-f",
        "--file",
        "prompt_file",
        type=click.Path(),
        help="Read the prompt from a file; -: from standard input.",
    ),
    click.option("--system", metavar="TEXT", help="A system message before the prompt."),
    click.option("--raw", is_flag=True, help="Do not apply the model's chat template."),
    click.option(
        "--template-var",
        "template_vars",
        multiple=True,
        metavar="NAME=VALUE",
        help="A variable of the chat template, its value as JSON (else text), e.g. "
        "enable_thinking=false; may be repeated.",
    ),
    click.option(
        "-n",
        "--max-tokens",
        type=click.IntRange(min=0),
        default=0,
        help="Most tokens to generate; 0 (default): until the model ends or its context does.",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="Ends the text where it comes up, and is left out of it; may be repeated.",
    ),
    click.option(
        "--grammar",
        metavar="GBNF|@FILE",
        help="Grammar that the text is held to, with a rule root.",
    ),
    click.option(
        "--json-schema",
        metavar="JSON|@FILE",
        help="The same from a JSON schema; {}: any JSON.",
    ),
    click.option(
        "--think",
        type=int,
        metavar="N",
        help="Most tokens of thinking: after so many its end is forced, and the answer follows.",
    ),
    click.option(
        "--think-end",
        metavar="TEXT",
        help="What ends thinking.  [default: what chat template or vocabulary have, else </think>]",
    ),
    click.option(
        "--think-start",
        metavar="TEXT",
        help='What begins it; "": the text does.  [default: what goes with --think-end, else ""]',
    ),
)
budget_options = _options(
    click.option(
        "--budget",
        metavar="N|auto",
        help="Tokens kept per layer and KV head; auto: method, budget and cache type that a "
        "profile of the model recommends, see reasonalloc-profile --recommend.  [default: 256]",
    ),
    click.option(
        "--no-budget", is_flag=True, help="Use llama.cpp's own cache, which keeps everything."
    ),
    click.option(
        "--method",
        type=click.Choice(["default", "paper"]),
        help="paper: policy, window and splits of arXiv:2606.11164, but for what is asked for.",
    ),
    click.option(
        "--policy",
        help="Rule by which tokens stay; see --list-policies. Evicted tokens are merged into kept "
        "ones with loss, dropped with others, unless --set merge=0|1.  [default: loss where "
        "budgets go by error curves, else rkv]",
    ),
    click.option(
        "--list-policies",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_list_policies,
        help="Show the policies and exit.",
    ),
    click.option(
        "--layers",
        metavar="uniform|pyramid|wave|error|N,N,...",
        help="Split of the budget over layers; error: over all heads of all layers, by measured "
        "curves.  [default: error with a profile that has curves, else uniform]",
    ),
    click.option(
        "--heads",
        metavar="uniform|adaptive|adaptive-literal|error",
        help="Split of a layer's budget over its KV heads, at every compression.  "
        "[default: uniform]",
    ),
    click.option(
        "--profile",
        metavar="auto|none|calibrate|PATH",
        help="Layer profile: the one that fits, if any; none; one measured now, and kept; a file.  "
        "[default: auto]",
    ),
    click.option(
        "--budget-swa",
        type=int,
        metavar="N",
        help="Tokens kept per KV head in layers with a sliding window, at most the window; 0: all, "
        "in llama.cpp's own cache of windows.  [default: 0]",
    ),
    click.option("--buffer", type=int, help="Tokens decoded between compressions.  [default: 128]"),
    click.option("--sinks", type=int, help="First tokens that always stay.  [default: 4]"),
    click.option(
        "--window",
        type=int,
        help="Newest tokens that always stay.  [default: 16; 8 to 15 with a budget below 64]",
    ),
    click.option(
        "--protect-prompt",
        metavar="auto|off|all|N",
        help="Prompt tokens that always stay; auto: up to (budget - sinks - window) / 2.  "
        "[default: auto]",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="A parameter of policy, allocators or attention, e.g. lambda=0.5; may be repeated.",
    ),
    click.option(
        "--kv-type",
        help="Type of the cache: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl.  "
        "[default: f16]",
    ),
)
model_options = _options(
    click.option(
        "--hf",
        metavar="REPO[:FILE]",
        help="Take MODEL from the Hugging Face hub; FILE may have * in it.  [default: the file "
        "with Q4_K_M in its name, or the only one]",
    ),
    click.option(
        "--no-mmap",
        "use_mmap",
        flag_value=False,
        default=True,
        type=bool,
        help="Read the file into memory instead of mapping it.",
    ),
    click.option(
        "--mlock", "use_mlock", is_flag=True, help="Keep the weights in memory: no swapping."
    ),
    click.option(
        "--batch",
        "n_batch",
        type=click.IntRange(1, 1 << 16),
        default=512,
        show_default=True,
        help="Tokens of a prompt that are read at a time; with a budget at most --buffer.",
    ),
    click.option(
        "--ctx",
        type=click.IntRange(min=1),
        help="Context in tokens; longer than trained with one of the --rope options.  "
        "[default: as trained]",
    ),
    click.option(
        "--rope-scaling",
        metavar="none|linear|yarn",
        help="How positions are stretched; linear and yarn: as far as --ctx asks for, where "
        "--rope-freq-scale is not given.  [default: as in the file]",
    ),
    click.option("--rope-freq-base", type=float, default=0.0, help="Base of the frequencies."),
    click.option(
        "--rope-freq-scale",
        type=float,
        default=0.0,
        help="Factor of positions: 0.25 stretches fourfold.",
    ),
    click.option("--yarn-orig-ctx", type=int, default=0, help="Trained context, tokens."),
    click.option("--yarn-ext-factor", type=float, default=-1.0, help="Extrapolation mix."),
    click.option("--yarn-attn-factor", type=float, default=1.0, help="Scale of the attention."),
    click.option("--yarn-beta-fast", type=float, default=32.0, help="Low correction dimension."),
    click.option("--yarn-beta-slow", type=float, default=1.0, help="High correction dimension."),
    threads_option(),
    click.option(
        "--gpu-layers",
        type=click.IntRange(min=-1),
        default=0,
        help="Layers to run on a GPU; -1: all.",
    ),
)
sampling_options = _options(
    click.option("--temp", type=float, help="Temperature; 0: greedy.  [default: 0.6]"),
    click.option(
        "--top-p",
        type=float,
        default=0.95,
        show_default=True,
        help="Nucleus sampling.",
    ),
    click.option(
        "--top-k",
        type=int,
        default=0,
        help="Draw from so many of the likeliest tokens; 0 (default): from all.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.0,
        help="Draw from tokens with this share of the likeliest one's probability; 0 (default): "
        "from all.",
    ),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        help="Seed of the sampling (and of the random policy): the same one gives the same text. "
        "-1: a random one, which the summary names.",
    ),
    click.option(
        "--repeat-penalty",
        type=float,
        default=1.0,
        help="Divides the logits of tokens that the text has had; 1 (default): off.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="Taken off the logits of tokens that the text has had; 0 (default): off.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="The same, once per time that it has had them; 0 (default): off.",
    ),
    click.option(
        "--repeat-last-n",
        type=int,
        default=64,
        show_default=True,
        help="Generated tokens that penalties look at; -1: all.",
    ),
    click.option(
        "--dry-multiplier",
        type=float,
        default=0.0,
        help="DRY: penalty of what would make a repetition longer, often 0.8; 0 (default): off.",
    ),
    click.option(
        "--dry-base", type=float, default=1.75, show_default=True, help="DRY: growth per token."
    ),
    click.option(
        "--dry-allowed-length",
        type=int,
        default=2,
        show_default=True,
        help="DRY: longest repetition that costs nothing.",
    ),
    click.option(
        "--dry-last-n",
        type=int,
        default=-1,
        show_default=True,
        help="DRY: generated tokens to look at; -1: all.",
    ),
    click.option(
        "--xtc-probability",
        type=float,
        default=0.0,
        help="XTC: how often the likeliest tokens are left out; 0 (default): off.",
    ),
    click.option(
        "--xtc-threshold",
        type=float,
        default=0.1,
        show_default=True,
        help="XTC: probability from which a token counts as likely.",
    ),
)
