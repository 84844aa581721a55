"""Figures of summarize.py: lines over training steps, and stacked bars. They know nothing of CSVs."""

from pathlib import Path
from typing import Any, NamedTuple

from towerspeech.results_table import checkpoint_order

FEW_SHOT = (("--", "s"), ("-.", "^"))  # stroke and marker; 0-shot and scores without shots are solid, reported dotted
CUT_OFF = 120  # percent: the top of a WER axis on which some values lie far above it
COLORS = (
    *("#1f77b4", "#d95f02", "#1b9e77", "#7b3fa0", "#b8860b", "#d62a5f", "#555555", "#17a2b8", "#8c564b", "#6aa121"),
    *("#8fc1e3", "#f7b27a", "#8fd1bb", "#c5a5dd", "#e3c77a", "#f29bb4", "#b5b5b5", "#96dbe6", "#cfaea7", "#bfdc8f"),
)


class Panel(NamedTuple):
    """One panel, and a pandas.DataFrame of what it shows.

    Of lines, a row a point, in the order of checkpoints: ``group`` (the mixture: its colour), ``shots`` (0-shot,
    5-shot, or nothing: its stroke), ``reported`` (by others), ``checkpoint`` (base, a step, sft, or another system's
    name), ``value``, ``low`` and ``high`` (NaN: no interval), ``note`` (written beside it).
    Of bars, a row a bar: ``name``, a column for each part, ``above`` (written there).
    """

    title: str
    rows: Any
    from_zero: bool = False
    zero_line: bool = False


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
    import pandas

    points = pandas.concat([panel.rows for panel in panels])
    all_shots = sorted(points["shots"].unique(), key=lambda shots: shots.zfill(12))
    few_shot = [shots for shots in all_shots if shots not in ("", "0-shot")]
    colors = {group: COLORS[i % len(COLORS)] for i, group in enumerate(groups)}
    num_columns = min(2 if len(panels) == 4 else len(panels), max_columns)
    width = 1 + (4.4 if num_columns > 1 else 5.6) * num_columns
    figure, axes = _grid(len(panels), num_columns, width, panel_height=2.9)
    for i, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        at, space = positions(set((points if share_x else panel.rows)["checkpoint"]))
        _draw_points(axis, panel, at, colors, few_shot)
        _place_checkpoints(axis, at, space)
        if panel.zero_line:
            axis.axhline(0, color="0.4", linewidth=0.8, zorder=1)
        if panel.from_zero:
            _cut_off(axis, panel, at, colors)
        if i + num_columns >= len(panels) and points["checkpoint"].str.isdigit().any():
            axis.set_xlabel("training step", fontsize=8.5)
    _add_legend(figure, points, colors, all_shots, few_shot)
    _save(figure, path)


def draw_bars(path: Path, panels: list[Panel], parts: dict[str, str]) -> None:
    """Panels of stacked bars, with one legend; ``parts`` has the columns, from below, and their names."""
    width = 1.2 + 0.52 * (1 + max(len(panel.rows) for panel in panels))
    longest = max(len(name) for panel in panels for name in panel.rows["name"])
    num_columns = max(1, min(len(panels), int(14 // width)))
    figure, axes = _grid(len(panels), num_columns, max(width, 3.6) * num_columns, panel_height=2.7 + 0.05 * longest)
    for axis, panel in zip(axes, panels, strict=True):
        bars = panel.rows.rename(columns=parts)
        bars.plot.bar(
            x="name", y=[*parts.values()], stacked=True, width=0.72, ax=axis, color=COLORS, legend=False, rot=0
        )
        highest = panel.rows[[*parts]].sum(axis="columns")
        for x, (top, text) in enumerate(zip(highest, bars["above"], strict=True)):
            axis.annotate(text, (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        axis.set(ylim=(0, 1.14 * highest.max() or 1), xlabel="")
        if longest * len(bars) > 40:
            _slant(axis, 40)
        axis.set_title(panel.title, fontsize=9.5, loc="left")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8.5, frameon=False)
    _save(figure, path)


def positions(names: set[str]) -> tuple[dict[str, float], float]:
    """Where each checkpoint lies: base at step 0, then its step; the others after the last step, evenly spaced.

    Returns:
        The positions, and the space between two of the others.
    """
    at = {name: float(name.replace("base", "0")) for name in names if is_trained(name)}
    last = max(at.values(), default=0.0)
    space = 0.16 * last or 1.0
    others = sorted(names - at.keys(), key=checkpoint_order)
    return at | {name: last + space * (i + 1) for i, name in enumerate(others)}, space


def is_trained(checkpoint: str) -> bool:
    """Whether a checkpoint is base or a step: these are joined by a line."""
    return checkpoint_order(checkpoint)[0] < 2


def _grid(num_panels: int, num_columns: int, width: float, panel_height: float):
    """A figure, and the axes of its panels, row by row (sizes in inches)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_rows = -(-num_panels // num_columns)
    size = (width, 0.7 + panel_height * num_rows)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[num_panels:]:
        axis.set_visible(False)
    for axis in axes.flat:
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, list(axes.flat[:num_panels])


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})  # the same bytes from every version
    plt.close(figure)


def _slant(axis, degrees: int) -> None:
    for label in axis.get_xticklabels():
        label.set(rotation=degrees, ha="right", rotation_mode="anchor")


def _stroke(color: str, shots: str, reported: bool, few_shot: list[str]) -> dict:
    """How a line and its points are drawn."""
    face = color
    linestyle, marker = (":" if reported else "-"), "o"
    if shots in few_shot:
        linestyle, marker = FEW_SHOT[few_shot.index(shots) % len(FEW_SHOT)]
        face = "white"
    marker = "x" if reported else marker
    return dict(color=color, linestyle=linestyle, marker=marker, markerfacecolor=face, markersize=4.5, linewidth=1.3)


def _draw_points(axis, panel: Panel, at: dict[str, float], colors: dict[str, str], few_shot: list[str]) -> None:
    """A panel's lines with their intervals, a little apart so that intervals do not hide each other."""
    lines = list(panel.rows.groupby(["group", "shots", "reported"], sort=False))
    bounded = panel.rows["low"].notna().any()
    apart = min(0.012, 0.08 / len(lines)) * (max(at.values()) or 1) if bounded else 0
    beside = (5, 3 if panel.zero_line else -2)  # not on the zero line
    for i, ((group, shots, reported), line) in enumerate(lines):
        x = line["checkpoint"].map(at).astype(float) + apart * (i - (len(lines) - 1) / 2)
        # An interval around the mean of its resamples need not hold the score of a very small test set.
        reach = [(line["value"] - line["low"]).clip(lower=0), (line["high"] - line["value"]).clip(lower=0)]
        axis.errorbar(x, line["value"], reach, fmt="none", ecolor=colors[group], capsize=2, linewidth=0.9)
        for place in zip(x, line["value"], line["note"], strict=True):
            axis.annotate(place[2], place[:2], beside, textcoords="offset points", fontsize=6, color="0.4")
        stroke = _stroke(colors[group], shots, reported, few_shot)
        joined = line["checkpoint"].map(is_trained).astype(bool)
        axis.plot(x[joined], line["value"][joined], **stroke)
        axis.plot(x[~joined], line["value"][~joined], **stroke | {"linestyle": ""})
    axis.set_title(panel.title, fontsize=9.5, loc="left")


def _place_checkpoints(axis, at: dict[str, float], space: float) -> None:
    """Write the checkpoints' names below the axis: all but steps too near to the next one for both to be read."""
    first, last = min(at.values()), max(at.values())
    shown: list[str] = []
    for name in sorted(at, key=at.get, reverse=True):
        both_steps = bool(shown) and name.isdigit() and shown[-1].isdigit()
        if not both_steps or at[shown[-1]] - at[name] > 0.08 * (last - first):
            shown.append(name)
    axis.set_xticks(
        [at[name] for name in shown], [name if len(name) <= 20 else f"{name[:19]}\u2026" for name in shown]
    )
    axis.set_xticks(list(at.values()), minor=True)
    if any(len(name) > 6 for name in at):
        _slant(axis, 25)
    trained = [x for name, x in at.items() if is_trained(name)]
    only_trained = len(trained) == len(at) and any(trained)
    margin = 0.05 * last if only_trained else 0.5 * space
    axis.set_xlim(first - margin, last + margin)
    if trained and len(trained) < len(at):
        axis.axvline(max(trained) + 0.5 * space, color="0.75", linewidth=0.8, linestyle=":")


def _cut_off(axis, panel: Panel, at: dict[str, float], colors: dict[str, str]) -> None:
    """From 0 up; where runaway outputs bring some rates far above the others, these are written at the upper edge."""
    axis.set_ylim(bottom=0)
    values = panel.rows["value"]
    if values.max() > 1.5 * CUT_OFF and values.min() < CUT_OFF:
        axis.set_ylim(top=CUT_OFF)
        for point in panel.rows[values > CUT_OFF].itertuples():
            how = dict(color=colors[point.group], fontsize=7.5, ha="center", va="top")
            place = (at[point.checkpoint], CUT_OFF)
            axis.annotate(f"\u2191{point.value:.0f}", place, (0, -1), textcoords="offset points", **how)


def _add_legend(figure, points, colors: dict[str, str], all_shots: list[str], few_shot: list[str]) -> None:
    from matplotlib.lines import Line2D

    drawn = set(points["group"])
    entries = [Line2D([], [], color=colors[group], linewidth=3, label=group) for group in colors if group in drawn]
    if few_shot:
        strokes = {shots: _stroke("0.3", shots, False, few_shot) for shots in all_shots if shots}
        entries += [Line2D([], [], **stroke, label=shots) for shots, stroke in strokes.items()]
    if points["reported"].any():
        entries.append(Line2D([], [], **_stroke("0.3", "", True, few_shot), label="reported by others"))
    if len(entries) > 1:
        width = 0.55 + 0.075 * max(len(entry.get_label()) for entry in entries)  # of an entry, in inches
        columns = max(1, int(figure.get_figwidth() / width))
        figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
