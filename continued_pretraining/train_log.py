"""What a run tells while it trains: train.log (a JSON object a line), the same for TensorBoard, and a plot of it."""

import json
import math
from pathlib import Path

from towerspeech.files import publish


class TrainLog:
    """train.log of a run and TensorBoard's events, to go on after a step: nothing of later steps is left."""

    def __init__(self, output_dir: Path, step: int):
        """``step`` is the last one that counts; -1 if nothing does."""
        from torch.utils.tensorboard import SummaryWriter

        path = output_dir / "train.log"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with publish(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - a line is there when it is written
        # TensorBoard is told anew what train.log says. By the ending stages know that its files are logs: no outputs,
        # and nothing to go on from.
        for old in output_dir.glob("events.out.tfevents.*.log"):
            old.unlink()
        self.board = SummaryWriter(output_dir, filename_suffix=".log")
        for line in kept:
            self.show(json.loads(line))
        self.board.flush()

    def write(self, row: dict) -> None:
        """Write a line."""
        print(json.dumps(row), file=self.file)
        self.show(row)
        self.board.flush()

    def show(self, row: dict) -> None:
        """Add a line to TensorBoard's charts; what is in parts is several curves."""
        for name, value in row.items():
            parts = {f"{name}/{part}": number for part, number in value.items()} if isinstance(value, dict) else {}
            for tag, number in (parts or {name: value}).items():
                if tag != "step":
                    self.board.add_scalar(tag, number, row["step"])


def draw(log: Path, path: Path) -> None:
    """Plot what train.log tells of the losses by source; of runs that hold nothing out, of training alone."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    panels = {
        title: [(row["step"], row[key]) for row in rows if key in row]
        for title, key in (("training loss", "losses"), ("loss of held-out documents", "validation"))
    }
    panels = {title: points for title, points in panels.items() if points}
    names = list(dict.fromkeys(name for points in panels.values() for _, by_source in points for name in by_source))
    colors = dict(zip(names, colormaps["turbo"]([(n + 0.5) / len(names) for n in range(len(names))]), strict=True))
    columns = math.ceil(len(names) / 20)
    figure = Figure(figsize=(5.5 * len(panels) + 1.6 * columns, 4.5), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in names:
            own = [(step, by_source[name]) for step, by_source in points if name in by_source]
            if own:
                mark = "." if len(own) < 50 else None
                axes.plot(*zip(*own, strict=True), color=colors[name], marker=mark, linewidth=1)
        axes.set(xlabel="step", ylabel="nats a token", title=title)
        axes.grid(alpha=0.3)
    handles = [axes.plot([], [], color=colors[name], label=name)[0] for name in names]
    figure.legend(handles=handles, loc="outside right center", ncols=columns, fontsize=7, frameon=False)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})  # the same bytes from every version
