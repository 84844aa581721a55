"""Figures of summarize.py: lines over training steps, and stacked bars. They know nothing of CSVs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FEW_SHOT = ("--", "-.")  # 0-shot and scores without shots are solid, reported ones dotted
CUT_OFF = 120  # percent: the top of a WER axis on which some values lie far above it
COLORS = (
    *("#1f77b4", "#d95f02", "#1b9e77", "#7b3fa0", "#b8860b", "#d62a5f", "#555555", "#17a2b8", "#8c564b", "#6aa121"),
    *("#8fc1e3", "#f7b27a", "#8fd1bb", "#c5a5dd", "#e3c77a", "#f29bb4", "#b5b5b5", "#96dbe6", "#cfaea7", "#bfdc8f"),
)


class Point(NamedTuple):
    checkpoint: str  # base, a step, sft, or another system's name
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""  # written beside it


class Line(NamedTuple):
    """One mixture's scores; only base and steps are joined."""

    group: str  # the mixture: its colour
    shots: str  # 0-shot, 5-shot, or nothing: its stroke
    points: list[Point]
    reported: bool = False  # by others


class Panel(NamedTuple):
    title: str
    lines: list[Line]
    from_zero: bool = False
    zero_line: bool = False


class Bars(NamedTuple):
    """Stacked bars, one a system."""

    title: str
    names: list[str]
    parts: list[tuple[float, ...]]  # a bar's parts, from below
    above: list[str]  # what is written above each bar
    ends: list[int]  # bars after which a gap separates two mixtures


def checkpoint_order(name: str) -> tuple[int, int, str]:
    """base, checkpoints by step, sft, others (control systems) by name."""
    place = 1 if name.isdigit() else {"base": 0, "sft": 2}.get(name, 3)
    return place, int(name) if place == 1 else 0, name


def positions(names: set[str]) -> tuple[dict[str, float], float]:
    """Where each checkpoint lies: base at step 0, then its step; the others after the last step, evenly spaced.

    Returns:
        The positions, and the space between two of the others.
    """
    at = {name: float(name.replace("base", "0")) for name in names if name.isdigit() or name == "base"}
    last = max(at.values(), default=0.0)
    space = 0.16 * last or 1.0
    others = sorted(names - at.keys(), key=checkpoint_order)
    return at | {name: last + space * (i + 1) for i, name in enumerate(others)}, space


def _label_checkpoints(axis, at: dict[str, float]) -> None:
    """Write the checkpoints' names below the axis: all but steps too near to the next one for both to be read."""
    span = max(at.values()) - min(at.values())
    slanted = any(len(name) > 6 for name in at)
    shown: list[str] = []
    for name in sorted(at, key=at.get, reverse=True):
        if not (shown and name.isdigit() and shown[-1].isdigit()) or at[shown[-1]] - at[name] > 0.08 * span:
            shown.append(name)
    axis.set_xticks(
        [at[name] for name in shown], [name if len(name) <= 20 else f"{name[:19]}\u2026" for name in shown]
    )
    axis.set_xticks(list(at.values()), minor=True)
    if slanted:
        for label in axis.get_xticklabels():
            label.set(rotation=25, ha="right", rotation_mode="anchor")


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})  # the same bytes from every version
    plt.close(figure)


def _clean(axis) -> None:
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _cut_off(axis, points: list[tuple[float, float, str]]) -> None:
    """From 0 up; where runaway outputs bring some rates far above the others, these are written at the upper edge."""
    axis.set_ylim(bottom=0)
    values = [value for _, value, _ in points]
    if max(values) > 1.5 * CUT_OFF and min(values) < CUT_OFF:
        axis.set_ylim(top=CUT_OFF)
        for x, value, color in [point for point in points if point[1] > CUT_OFF]:
            how = dict(color=color, fontsize=7.5, ha="center", va="top")
            axis.annotate(f"\u2191{value:.0f}", (x, CUT_OFF), xytext=(0, -1), textcoords="offset points", **how)


def draw_lines(
    path: Path, panels: list[Panel], groups: list[str], max_columns: int = 3, share_x: bool = False
) -> None:
    """Panels of scores over training steps, with one legend for all of them.

    Args:
        path: PNG to write.
        panels: What to draw, row by row.
        groups: All mixtures of all figures, in the order of their colours.
        max_columns: Panels beside each other.
        share_x: Give all panels the same checkpoints.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    lines = [line for panel in panels for line in panel.lines]
    all_shots = sorted({line.shots for line in lines}, key=lambda shots: shots.zfill(12))
    few_shot = [shots for shots in all_shots if shots not in ("", "0-shot")]
    colors = {group: COLORS[i % len(COLORS)] for i, group in enumerate(groups)}

    def stroke(color: str, shots: str, reported: bool) -> dict:
        few = shots in few_shot
        style = FEW_SHOT[few_shot.index(shots) % len(FEW_SHOT)] if few else ":" if reported else "-"
        marker = "x" if reported else "s" if few else "o"
        filled = "white" if few else color
        return dict(color=color, linestyle=style, marker=marker, markerfacecolor=filled, markersize=4.5, linewidth=1.3)

    num_columns = min(2 if len(panels) == 4 else len(panels), max_columns)
    num_rows = -(-len(panels) // num_columns)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(1 + (4.4 if num_columns > 1 else 5.6) * num_columns, 0.7 + 2.9 * num_rows),
        squeeze=False,
        layout="constrained",
    )
    everywhere = {point.checkpoint for line in lines for point in line.points}
    for axis, panel in zip(axes.flat, panels, strict=False):
        names = everywhere if share_x else {point.checkpoint for line in panel.lines for point in line.points}
        at, space = positions(names)
        trained = [x for name, x in at.items() if name.isdigit() or name == "base"]
        bounded = any(point.low is not None for line in panel.lines for point in line.points)
        # So that intervals do not hide each other.
        dodge = min(0.012, 0.08 / len(panel.lines)) * (max(at.values()) or 1) * bounded
        for i, line in enumerate(panel.lines):
            shift = dodge * (i - (len(panel.lines) - 1) / 2)
            points = sorted(line.points, key=lambda point: checkpoint_order(point.checkpoint))
            xs = [at[point.checkpoint] + shift for point in points]
            values = [point.value for point in points]
            # An interval around the mean of its resamples need not hold the score of a very small test set.
            below = [0 if p.low is None else max(p.value - p.low, 0) for p in points]
            above = [0 if p.high is None else max(p.high - p.value, 0) for p in points]
            if any(below) or any(above):
                color = colors[line.group]
                axis.errorbar(xs, values, yerr=[below, above], fmt="none", ecolor=color, capsize=2, linewidth=0.9)
            for x, point in zip(xs, points, strict=True):
                beside = (5, 3 if panel.zero_line else -2)  # not on the zero line
                how = dict(xytext=beside, textcoords="offset points", fontsize=6, color="0.4")
                axis.annotate(point.note, (x, point.value), **how)
            joined = sum(point.checkpoint.isdigit() or point.checkpoint == "base" for point in points)
            how = stroke(colors[line.group], line.shots, line.reported)
            axis.plot(xs[:joined], values[:joined], **how)
            axis.plot(xs[joined:], values[joined:], **how | {"linestyle": ""})
        _label_checkpoints(axis, at)
        margin = 0.5 * space if len(at) > len(trained) or not any(trained) else 0.05 * max(trained)
        axis.set_xlim(min(at.values()) - margin, max(at.values()) + margin)
        if trained and len(trained) < len(at):
            axis.axvline(max(trained) + 0.5 * space, color="0.75", linewidth=0.8, linestyle=":")
        if panel.zero_line:
            axis.axhline(0, color="0.4", linewidth=0.8, zorder=1)
        _clean(axis)
        if panel.from_zero:
            _cut_off(
                axis, [(at[p.checkpoint], p.value, colors[line.group]) for line in panel.lines for p in line.points]
            )
        axis.set_title(panel.title, fontsize=9.5, loc="left")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if any(name.isdigit() for name in everywhere):
        for axis in axes.flat[max(0, len(panels) - num_columns) : len(panels)]:
            axis.set_xlabel("training step", fontsize=8.5)
    drawn = {line.group for line in lines}
    entries = [Line2D([], [], color=colors[group], linewidth=3, label=group) for group in groups if group in drawn]
    if few_shot:
        entries += [Line2D([], [], **stroke("0.3", shots, False), label=shots) for shots in all_shots if shots]
    if any(line.reported for line in lines):
        entries.append(Line2D([], [], **stroke("0.3", "", True), label="reported by others"))
    if len(entries) > 1:
        width = 0.55 + 0.075 * max(len(entry.get_label()) for entry in entries)  # of an entry, in inches
        columns = max(1, int(figure.get_figwidth() / width))
        figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
    _save(figure, path)


def draw_bars(path: Path, panels: list[Bars], part_names: Sequence[str]) -> None:
    """Panels of stacked bars, with one legend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most = max(len(panel.names) for panel in panels)
    width = 1.2 + 0.52 * (most + 1)
    num_columns = max(1, min(len(panels), int(14 // width)))
    num_rows = -(-len(panels) // num_columns)
    longest = max(len(name) for panel in panels for name in panel.names)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(max(width, 3.6) * num_columns, 0.6 + (2.7 + 0.05 * longest) * num_rows),
        squeeze=False,
        layout="constrained",
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        gaps = [sum(end <= i for end in panel.ends) for i in range(len(panel.names))]
        xs = [i + 0.6 * gap for i, gap in enumerate(gaps)]
        floor = [0.0] * len(xs)
        for number, name in enumerate(part_names):
            heights = [parts[number] for parts in panel.parts]
            axis.bar(xs, heights, 0.72, bottom=floor, color=COLORS[number], label=name)
            floor = [low + height for low, height in zip(floor, heights, strict=True)]
        for x, top, text in zip(xs, floor, panel.above, strict=True):
            axis.annotate(text, (x, top), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
        axis.set_ylim(top=1.14 * max(floor) or 1)
        axis.set_xlim(-0.8, xs[-1] + 0.8)
        slanted = longest * len(xs) > 40
        axis.set_xticks(xs, panel.names, rotation=40 if slanted else 0, ha="right" if slanted else "center")
        if slanted:
            for label in axis.get_xticklabels():
                label.set_rotation_mode("anchor")
        _clean(axis)
        axis.set_title(panel.title, fontsize=9.5, loc="left")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8.5, frameon=False)
    _save(figure, path)
