"""KL divergence against bytes of cache, as a picture."""

from __future__ import annotations

from ..engine.errors import ConfigError
from ..eval.results.plot import draw_curve, log_ticks, plain
from ..eval.results.tables import MIB
from ..output.picture import check_picture, save_figure
from .report import Report
from .rows import OWN, TEXT

_TITLES = {TEXT: "files", OWN: "the model's own texts"}


def save_plot(report: Report, path: str) -> None:
    """Draw one curve per method with 95% intervals; a panel for files, one for own texts.

    Parameters
    ----------
    report : Report
        What to draw.
    path : str
        Its ending names the format: .png, .svg or .pdf. The same report gives the same SVG or PDF.

    Raises
    ------
    ConfigError
        No arm has a budget, the file cannot be written, or matplotlib is missing.
    """
    check_picture(path)
    budgeted = [arm for arm in report.arms if arm.budget > 0]
    if not budgeted:
        raise ConfigError("there is nothing to plot: no arm has a budget")
    from matplotlib.figure import Figure

    sources = list(dict.fromkeys(arm.source for arm in budgeted))
    figure = Figure(figsize=(1.5 + 5.5 * len(sources), 4.8), layout="constrained")
    panels = figure.subplots(1, len(sources), sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(arm.method for arm in budgeted))
    for axes, source in zip(panels, sources):
        arms = [arm for arm in budgeted if arm.source == source]
        for i, method in enumerate(methods):
            mine = [arm for arm in arms if arm.method == method]
            draw_curve(axes, [(arm.kv_bytes / MIB, arm.kl.own) for arm in mine], method, i)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        ticks = log_ticks([arm.kv_bytes / MIB for arm in arms])
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(_TITLES[source], fontsize="medium")
        axes.set_xlabel("cache (MiB, budget + buffer)")
    panels[0].set_ylabel("KL from the full cache, nats a token (bars: 95%)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.suptitle(plain(str(report.settings.get("model", ""))))
    save_figure(figure, path)
