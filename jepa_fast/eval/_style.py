"""One look for every picture, whatever the user's own matplotlib settings; matplotlib is imported on first use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INK, MUTED, LINE, ACCENT = "#1f2328", "#656d76", "#d8dee4", "#1f5fa8"

_STYLE = {
    "figure.dpi": 144, "savefig.dpi": 144, "figure.facecolor": "white", "axes.facecolor": "white",
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "figure.titlesize": 11, "figure.titleweight": "bold",
    "text.color": INK, "axes.titlecolor": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.edgecolor": LINE, "axes.spines.top": False, "axes.spines.right": False, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "lines.linewidth": 1.5, "legend.frameon": False, "legend.fontsize": 8,
}


@contextmanager
def drawing(out_png: Path | str, width: float, height: float) -> Iterator:
    """A matplotlib Figure of width x height inches, written to `out_png` (NAME.png) when the block ends."""
    if Path(out_png).suffix != ".png":
        raise ValueError(f"out_png must be a file name ending in .png, got {str(out_png)!r}")
    # not pyplot: no global state, no window system
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(out_png, format="png")
