"""A picture of its own, as a file: SVG or PNG by matplotlib, which comes with `pip install kvbench[plot]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from kvbench.files import write_bytes
from kvbench.render.document import Axis, View

ENDINGS = (".svg", ".png")
# as in the page: a colour and a shape for each verdict
MARKS = {
    "worse": ("#b3261e", "^", "WORSE"),
    "better": ("#1a6e2e", "*", "BETTER"),
    "same": ("#1a6e2e", "o", "EQUIVALENT"),
    "open": ("#8a5a00", "D", "INCONCLUSIVE"),
    "void": ("#57606a", "s", "baseline, or not tested"),
}
# of a view whose points have no verdicts: for each series one
SERIES = (("#57606a", "s"), ("#0550ae", "o"), ("#953800", "^"), ("#1a6e2e", "D"))
TICKS = (1, 2, 3, 4, 6, 8, 12, 16)
CROWDED = 7.0  # inches of a panel with many names
# of a name, in points from its mark; a frontier falls to the right, so it is free above right and below left
PLACES = (
    ((6, 5), "left"),
    ((-6, -10), "right"),
    ((6, -10), "left"),
    ((-6, 5), "right"),
    ((6, 11), "left"),
    ((6, -17), "left"),
)
REACH = 3  # points from a mark's middle to its edge


def save(views: Sequence[View], path: Path) -> None:
    """Draws views of points beside each other into a file; the same views give the same SVG.

    Raises:
        ValueError: the file's name ends in neither .svg nor .png, or matplotlib is not there.
        OSError: it can't be written.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path}: a picture is a file that ends in {' or '.join(ENDINGS)}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib, which is not installed: pip install 'kvbench[plot]'") from None
    settings: dict[Any, Any] = {
        "svg.hashsalt": "kvbench",
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 9,
    }
    with matplotlib.rc_context(settings):
        height = CROWDED if max(len(view.points) for view in views) > 30 else 4.2
        figure = Figure(figsize=(1 + 5.2 * len(views), height), dpi=160, layout="constrained")
        panels = [figure.add_subplot(1, len(views), place) for place in range(1, len(views) + 1)]
        for panel, view in zip(panels, views, strict=True):
            _draw(panel, view)
        figure.draw_without_rendering()  # which settles where panels and points are
        for panel, view in zip(panels, views, strict=True):
            _name(panel, view)
        drawn = BytesIO()
        # without the day, so that the same numbers are the same file
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(drawn, format=path.suffix[1:], metadata=metadata)
    write_bytes(path, drawn.getvalue())


def _draw(panel: Any, view: View) -> None:
    front = sorted((point for point in view.points if point.get("front")), key=lambda point: float(point["x"]))
    panel.plot([p["x"] for p in front], [p["y"] for p in front], color="#57606a", linewidth=1, zorder=1)
    for line in view.y.lines:
        panel.axhline(line, color="#57606a", linewidth=0.8, linestyle="--")
    used = dict.fromkeys(str(point.get("series") or point["mark"]) for point in view.points)
    kinds = MARKS | {name: (*SERIES[i % len(SERIES)], name) for i, name in enumerate(n for n in used if n not in MARKS)}
    for mark in used:
        colour, shape, word = kinds[mark]
        points = [point for point in view.points if (point.get("series") or point["mark"]) == mark]
        for point in points:
            if point.get("low") is not None and not (view.y.log and point["low"] <= 0):
                panel.plot([point["x"]] * 2, [point["low"], point["high"]], color=colour, linewidth=1.2, zorder=2)
        xs, ys = [p["x"] for p in points], [p["y"] for p in points]
        panel.scatter(
            xs, ys, marker=shape, facecolor=f"{colour}55", edgecolor=colour, s=(2 * REACH) ** 2, zorder=3, label=word
        )
    _scale(panel, view.x, "x")
    _scale(panel, view.y, "y")
    panel.grid(color="#d0d7de", linewidth=0.5)
    panel.set_axisbelow(True)
    panel.margins(x=0.14, y=0.08)
    panel.legend(frameon=False, fontsize=8)
    panel.set_title(", ".join(view.choice.values()), fontsize=9.5)


def _name(panel: Any, view: View) -> None:
    """Names beside the points, those on the frontier first; none over another, over a mark, or beyond the axes.

    Where marks leave no room, a name on the frontier goes over them and any other is left out.
    """
    from matplotlib.transforms import Bbox

    reach = REACH * panel.figure.dpi / 72
    middles = panel.transData.transform([(float(point["x"]), float(point["y"])) for point in view.points])
    marks = [Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach) for x, y in middles]
    taken = [panel.get_legend().get_window_extent()]
    inside = panel.get_window_extent().padded(-8)
    for point in sorted(view.points, key=lambda point: not point.get("front")):
        for kept_free in (marks, []) if point.get("front") else (marks,):
            if box := _beside(panel, point, inside, [*taken, *kept_free]):
                taken.append(box.padded(2))
                break


def _beside(panel: Any, point: Mapping[str, Any], inside: Any, taken: Sequence[Any]) -> Any:
    """The box of a point's name, drawn at the first place that is free; None where none is."""
    for (x, y), align in PLACES:
        text = panel.annotate(
            point.get("label", ""),
            (point["x"], point["y"]),
            xytext=(x, y),
            textcoords="offset points",
            ha=align,
            fontsize=7.5,
        )
        text.set_in_layout(False)  # panels stay where they are
        box = text.get_window_extent()
        within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if within and not any(box.overlaps(other) for other in taken):
            return box
        text.remove()
    return None


def _scale(panel: Any, axis: Axis, which: str) -> None:
    getattr(panel, f"set_{which}label")(axis.label)
    if not axis.log:
        return
    getattr(panel, f"set_{which}scale")("log", base=2 if which == "x" else 10)
    if which == "x":
        low, high = panel.get_xlim()
        ticks = [tick for tick in TICKS if low <= tick <= high]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_xticks([], minor=True)
