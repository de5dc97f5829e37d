"""Plots as image files, with matplotlib if it is installed."""

import io
from typing import Any

from stride_ray.runtime.errors import StrideError


def new_figure(width: float, height: float, kept: str) -> Any:
    """An empty matplotlib figure, in inches, that never opens a display.

    Raises:
        StrideError: matplotlib is not installed; ``kept`` names what is there without the plot.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise StrideError(
            f"The plot needs a package that is not installed: pip install 'stride-ray[plots]'; {kept} are kept."
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def image_bytes(figure: Any, form: str) -> bytes:
    """A figure as png or svg; byte-identical for the same content."""
    import matplotlib

    buffer = io.BytesIO()
    # SVGs are only byte-identical with a fixed hash salt and without a date.
    with matplotlib.rc_context({"svg.hashsalt": "stride_ray", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()
