"""How a plot is drawn: matplotlib without a display, in colours that a page can make go dark."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn in these colours, which then become CSS variables of the page, so that it can go dark.
PALETTE = {
    "#565e6b": "ink",
    "#d5d9e0": "rule",
    "#2a62c9": "blue",
    "#c2571a": "orange",
    "#16806a": "green",
    "#8b4fb3": "purple",
    "#c03548": "red",
    "#1fa3c4": "sky",
    "#a08a1c": "olive",
    "#d264a4": "pink",
    "#8a5a3c": "brown",
    "#3d4a9c": "indigo",
}
INK, RULE, BLUE, ORANGE, GREEN, PURPLE, RED, *_MORE = PALETTE
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, *_MORE)
"""Colours that can be told apart, for series of one plot."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.xmargin": 0.02,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One plot.

    Attributes:
        title: Its name, also for screen readers.
        caption: What it shows, in words and with its main figures.
        legend: (what, CSS colour) of each series; empty if there is one only.
        svg: Safe markup.
    """

    title: str
    caption: str
    legend: tuple[tuple[str, str], ...]
    svg: str


Paint: TypeAlias = "Callable[[Axes], None]"
"""Draws into empty axes."""


def draw(title: str, caption: str, paint: Paint) -> Chart:
    """Return the chart that ``paint`` draws."""
    buffer = io.StringIO()
    with _painted(paint, title) as figure:
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        legend = tuple(_legend(figure.axes[0]))
    return Chart(
        title=title,
        caption=caption,
        legend=legend if len(legend) > 1 else (),
        svg=_inline(buffer.getvalue(), title, caption),
    )


def draw_png(title: str, paint: Paint) -> bytes:
    """Return what ``paint`` draws as a picture with its title and its legend."""
    buffer = io.BytesIO()
    with _painted(paint, title) as figure:
        axes = figure.axes[0]
        axes.set_title(title)
        if len(list(_legend(axes))) > 1:
            figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


@contextmanager
def _painted(paint: Paint, title: str) -> Generator[Figure, None, None]:
    """Lend a figure that ``paint`` has drawn into, while our style holds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(5.4, 2.7), layout="constrained")
        paint(figure.add_subplot())
        yield figure


def _legend(axes: Axes) -> Iterator[tuple[str, str]]:
    """Yield (label, CSS colour) of each series; the page sets them, and so they wrap."""
    from matplotlib.colors import to_hex
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        if isinstance(handle, Line2D):
            color = to_hex(handle.get_color())
        elif isinstance(handle, Patch):
            color = to_hex(handle.get_facecolor())
        else:
            continue
        yield label, f"var(--{PALETTE[color]}, {color})"


def _inline(document: str, title: str, description: str) -> str:
    """Return the ``<svg>`` of a document: themed, named for screen readers, free of shared ids."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    for color, name in PALETTE.items():
        svg = svg.replace(color, f"var(--{name}, {color})")
    name = html.escape(title)
    head = f"<title>{name}</title><desc>{html.escape(description)}</desc>"
    svg = svg.replace(">", f">{head}", 1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
