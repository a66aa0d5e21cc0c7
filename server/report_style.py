"""The house style of every page, as reports know it: see common/report_style.py and report_plots.py."""

from common.report_plots import Line, plot_bars, plot_epsilon, plot_metric
from common.report_style import (
    STYLE,
    alarm,
    bullets,
    figure,
    fixed,
    general,
    many,
    number,
    pairs,
    rounded_down,
    rounded_up,
    safe,
    table,
    tally,
)

__all__ = [
    "STYLE",
    "Line",
    "alarm",
    "bullets",
    "figure",
    "fixed",
    "general",
    "many",
    "number",
    "pairs",
    "plot_bars",
    "plot_epsilon",
    "plot_metric",
    "rounded_down",
    "rounded_up",
    "safe",
    "table",
    "tally",
]
