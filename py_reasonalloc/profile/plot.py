"""Pictures of layer profiles: bars in the terminal, and a file with matplotlib."""

from __future__ import annotations

from ..output.picture import check_picture, save_figure
from .files import Profile

_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(share: float, width: int) -> str:
    """Return a bar of up to `width` characters for a share of 0 to 1, in eighths of one."""
    n = round(max(0.0, min(share, 1.0)) * width * 8)
    return ("█" * (n // 8) + _EIGHTHS[n % 8]).rstrip()


def terminal_plot(profile: Profile, width: int = 50) -> str:
    """Return one line per layer: its number, a bar, its demand in tokens."""
    largest = max(profile.demand)
    digits = len(str(profile.n_layer - 1))
    head = (
        f"{profile.name}: tokens for {100 * profile.rho:g}% of the attention{_span(profile)}, "
        f"by layer (mean of {profile.n_steps} decode steps, {profile.n_prompts} prompts)"
    )
    lines = [
        f"{il:>{digits}} {bar(demand / largest, width):<{width}} {demand:.1f}"
        for il, demand in enumerate(profile.demand)
    ]
    return "\n".join([head, *lines])


def budget_lines(budgets: list[list[int]], budget: int, n_protect: int = 0) -> str:
    """Return one line per layer: its number and the budgets of its KV heads, tokens."""
    digits = len(str(len(budgets) - 1))
    width = len(str(max(max(row, default=0) for row in budgets)))
    protected = f", {n_protect} of them protected" if n_protect > 0 else ""
    head = f"tokens of each KV head, by error curves, {budget} on average{protected}:"
    lines = [
        f"{il:>{digits}} " + " ".join(f"{n:>{width}}" for n in row)
        for il, row in enumerate(budgets)
    ]
    return "\n".join([head, *lines])


def _span(profile: Profile) -> str:
    return f" of {profile.horizon} steps" if profile.horizon > 0 else ""


def save_picture(
    profiles: list[Profile], path: str, budgets: list[list[int]] | None = None
) -> None:
    """Draw the demand of every layer; several profiles as shares of their own mean.

    Parameters
    ----------
    budgets : list of list of int, optional
        Tokens of each KV head of each layer, drawn below.

    Raises
    ------
    ConfigError
        The file cannot be written, or matplotlib is missing.
    """
    check_picture(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    n_panels = 1 if budgets is None else 2
    figure = Figure(figsize=(7.0, 3.2 * n_panels), layout="constrained")
    axes = figure.add_subplot(n_panels, 1, 1)
    for profile in profiles:
        mean = sum(profile.demand) / profile.n_layer
        values = [d if len(profiles) == 1 else d / mean for d in profile.demand]
        axes.plot(range(profile.n_layer), values, marker="o", label=profile.name)
    axes.set_xlabel("layer")
    tokens = f"tokens for {100 * profiles[0].rho:g}% of the attention{_span(profiles[0])}"
    axes.set_ylabel(tokens if len(profiles) == 1 else "demand / mean demand")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    if budgets is not None:
        below = figure.add_subplot(n_panels, 1, 2, sharex=axes)
        for il, row in enumerate(budgets):
            below.plot([il] * len(row), row, linestyle="", marker="_", color="C0", markersize=9)
        below.set_xlabel("layer")
        below.set_ylabel("budgets of its KV heads, tokens")
        below.set_ylim(bottom=0)
        below.grid(alpha=0.3)
    save_figure(figure, path)
