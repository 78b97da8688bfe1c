"""What all plots share. matplotlib is imported when a figure is made."""

from __future__ import annotations

import math
import textwrap
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that size in inches.

    Raises:
        ImportError: When matplotlib is not installed.
    """
    try:
        # Not pyplot: that would choose a window system and keep every figure.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def add_legend(figure: Any) -> None:
    """Adds a legend below: as many columns as its texts leave room for, and the figure as much higher as it needs."""
    handles, texts = figure.axes[0].get_legend_handles_labels()
    if not texts:
        return
    width, height = figure.get_size_inches()
    # What is too long for one column is broken into lines.
    texts = ["\n".join(textwrap.wrap(text, int((width - 0.7) / 0.08))) for text in texts]
    lines = max(text.count("\n") + 1 for text in texts)
    wide = 0.7 + 0.08 * max(
        len(line) for text in texts for line in text.split("\n")
    )  # Inches: those of a line and its margins, and of each letter.
    columns = max(1, min(len(texts), int(width / wide)))
    figure.set_size_inches(width, height + 0.2 * lines * math.ceil(len(texts) / columns))
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize="small")


def style(i: int) -> dict[str, Any]:
    """Ten colors, then the same with other dashes."""
    return {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}


def literal(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
