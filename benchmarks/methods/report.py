"""From the runs: a table for each task and a picture, with intervals, and no winner where they overlap."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.methods.methods import ALPHA, BASE, RANK, all_methods
from benchmarks.methods.plan import SEEDS, Record, best_rate, is_tuned, tried
from benchmarks.methods.tasks import BATCH, TASKS
from benchmarks.speed.report import insert
from lorafit.files import write_json, write_text

MARK = "comparison"
# Student's t for 95 %, by the number of values less one.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NORMAL = 1.96


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    middle: float
    low: float
    high: float

    def parts_from(self, other: "Interval") -> bool:
        return self.high < other.low or other.high < self.low


def read_records(folder: Path, machine: Record, settings: Record) -> list[Record]:
    """The runs in `folder` that may stand in one table."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if record["machine"] == machine and record["settings"] == settings]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Of the mean over seeds, by Student's t; None for fewer than two."""
    if len(values) < 2:
        return None
    middle = statistics.fmean(values)
    half = STUDENT.get(len(values) - 1, 2.26) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(middle, middle - half, middle + half)


def share_interval(counts: Sequence[int], rows: int) -> Interval | None:
    """Of the share of right answers, by Wilson: as if all seeds together had answered each row once.

    The rows are the same for all seeds, so that more seeds are no more rows; where the seeds differ by more than the
    rows explain, their own interval is the wider one and counts.
    """
    if not counts or not rows:
        return None
    p, z = statistics.fmean(counts) / rows, NORMAL
    centre = (p + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    seeds = mean_interval([count / rows for count in counts])
    low = min(centre - half, seeds.low if seeds else 1.0)
    high = max(centre + half, seeds.high if seeds else 0.0)
    return Interval(p, max(0.0, low), min(1.0, high))


def summarise(records: Sequence[Record]) -> list[Record]:
    """One line per task and method that has been tried, in the methods' order."""
    losses = tried(records)
    lines = []
    for task in TASKS:
        for method in all_methods():
            if found := losses.get((task, method)):
                own = [r for r in records if (r["task"], r["method"]) == (task, method)]
                lines.append(_line(task, method, found, own))
    return [line | _compared(line, lines) for line in lines]


def _line(task: str, method: str, found: dict[float, float], own: Sequence[Record]) -> Record:
    rate = best_rate(found)
    final = [r for r in own if r["seed"] in SEEDS and r["lr"] == rate and r["loss"] is not None]
    exact = [r["exact"] for r in final if r["exact"] is not None]
    ran = [r for r in own if r["steps"]]
    return {
        "task": task,
        "method": method,
        "lr": rate,
        "rates": len(found),
        "tuned": is_tuned(found),
        "seeds": len(final),
        "loss": mean_interval([r["loss"] for r in final]),
        "one_loss": next((r["loss"] for r in own if r["lr"] == rate and r["loss"] is not None), None),
        "exact": share_interval(exact, final[0]["reported_rows"]) if exact else None,
        "init_seconds": _median(ran, "init_cpu_seconds"),
        "step_seconds": statistics.median(r["train_cpu_seconds"] / r["steps"] for r in ran) if ran else None,
        "memory": _median(ran, "memory"),
        "adapter_bytes": _median(ran, "adapter_bytes"),
    }


def _median(records: Sequence[Record], key: str) -> float | None:
    known = [r[key] for r in records if r[key] is not None]
    return statistics.median(known) if known else None


def _compared(line: Record, lines: Sequence[Record]) -> Record:
    """How the line stands to plain LoRA of its task: in words, and in time."""
    base = next((one for one in lines if one["task"] == line["task"] and one["method"] == BASE), None)
    if base is None or base is line:
        return {"verdict": "", "times_lora": None}
    times = line["step_seconds"] / base["step_seconds"] if line["step_seconds"] and base["step_seconds"] else None
    return {"verdict": verdict(line, base), "times_lora": times}


def verdict(line: Record, base: Record) -> str:
    """"better" or "worse" only where both are tuned, all seeds have run and the intervals of the loss part."""
    if not (line["tuned"] and base["tuned"]):
        return "not tuned"
    if min(line["seeds"], base["seeds"]) < len(SEEDS):
        return "seeds missing"
    if not line["loss"].parts_from(base["loss"]):
        return "no difference shown"
    return "better" if line["loss"].middle < base["loss"].middle else "worse"


def winner(lines: Sequence[Record]) -> str | None:
    """The method whose interval lies below that of every other one, all of them tuned and run; None: there is none."""
    whole = [line for line in lines if line["tuned"] and line["seeds"] >= len(SEEDS)]
    if len(whole) < max(2, len(lines)):
        return None
    best, *others = sorted(whole, key=lambda line: line["loss"].middle)
    return best["method"] if all(best["loss"].high < other["loss"].low for other in others) else None


# --- what a reader sees --------------------------------------------------------------------------------

COLUMNS = (
    "method", "learning rate", "held-out loss (95 %)", "exactly right (95 %)", "loss beside LoRA's", "seeds",
    "start, CPU s", "CPU s per step", "× LoRA", "memory, MiB", "adapter, MB",
)  # fmt: skip


def table(lines: Sequence[Record], records: Sequence[Record]) -> str:
    """Markdown: one table per task, what it shows, and what was measured where."""
    if not lines:
        return "Nothing was measured yet: `python -m benchmarks.methods`."
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    parts = []
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        best = winner(own)
        shown = f"Winner: {best}." if best else "No winner: the intervals of the best overlap, or runs are missing."
        title = f"**{TASKS[task].about}**, {_budget(records, task)}"
        parts.append(f"{title}\n\n{head}" + "\n".join(map(_row, own)) + f"\n\n{shown}")
    return "\n\n".join([*parts, _footnote(records)])


def _budget(records: Sequence[Record], task: str) -> str:
    own = [record for record in records if record["task"] == task]
    steps, rows = max(record["steps"] for record in own), own[0]["reported_rows"]
    return f"{steps} steps of {BATCH} rows a run, loss over {rows} held-out rows"


def _row(line: Record) -> str:
    rate = f"{line['lr']:g} of {line['rates']}" + ("" if line["tuned"] else ", not tuned")
    loss = _spread(line["loss"], "{:.4f}") if line["loss"] else _number(line["one_loss"], "{:.4f}")
    exact, memory, size = line["exact"], line["memory"], line["adapter_bytes"]
    cells = (
        line["method"],
        rate,
        loss,
        "–" if exact is None else _spread(exact, "{:.0%}"),
        line["verdict"],
        str(line["seeds"]),
        _number(line["init_seconds"], "{:.2g}"),
        _number(line["step_seconds"], "{:.3g}"),
        _number(line["times_lora"], "{:.2f}"),
        _number(memory and memory / 2**20, "{:.0f}"),
        _number(size and size / 1e6, "{:.1f}"),
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _spread(interval: Sequence[float], form: str) -> str:
    middle, low, high = (form.format(value) for value in interval)
    return f"{middle} ({low}–{high})"


def _footnote(records: Sequence[Record]) -> str:
    settings, machine = records[0]["settings"], records[0]["machine"]
    return (
        f"SmolLM2-135M-Instruct, r = {RANK}, alpha = {ALPHA:g}, {settings['dtype']}, {settings['rows']} rows × "
        f"{settings['epochs']} epochs; {len(records)} runs. The rate is chosen on other rows and by another seed than "
        "what is reported (half-decades, three and more: both neighbours of the best one were tried). Intervals of the "
        f"loss are over {len(SEEDS)} seeds (Student's t); one number alone is one seed. {machine['cpu']}, threads: "
        f"{machine['threads']}, torch {machine['versions']['torch']}. Times are the processor's, which other work "
        "beside it changes little; memory is the peak above the loaded model. Made by `python -m benchmarks.methods`."
    )


def write(records: Sequence[Record], results: Path, page: Path) -> str:
    """The JSON, the picture and the page's part; returns the table."""
    lines = summarise(records)
    text = table(lines, records)
    if lines:
        about = {key: records[0][key] for key in ("machine", "settings")}
        write_json(results / "methods.json", about | {"lines": [_plain(line) for line in lines]})
        draw(lines, results / "methods.png")
        where = "benchmarks/results/methods.png" if page.parent.name == "docs" else "methods.png"
        link = f"../{where}" if page.parent.name == "docs" else where
        text += f"\n\n![held-out loss of every method, with intervals]({link})"
        old = page.read_text() if page.exists() else "# Methods\n"
        write_text(page, insert(old, text, MARK))
    return text


def _plain(line: Record) -> Record:
    return {key: value._asdict() if isinstance(value, Interval) else value for key, value in line.items()}


def draw(lines: Sequence[Record], path: Path) -> None:
    """The loss of each method with its interval, a panel per task, plain LoRA's interval behind them."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(line["task"] for line in lines))
    most = max(sum(line["task"] == task for line in lines) for task in tasks)
    figure = Figure(figsize=(6 * len(tasks), 1.2 + 0.28 * most), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own: list[Any] = [line for line in lines if line["task"] == task and (line["loss"] or line["one_loss"])][::-1]
        for place, line in enumerate(own):
            colour = "tab:blue" if line["method"] == BASE else "tab:gray"
            if interval := line["loss"]:
                axes.plot(interval[1:], [place, place], color=colour)
            middle = interval.middle if interval else line["one_loss"]
            axes.plot(middle, place, marker="o" if interval and line["tuned"] else "x", color=colour)
            if line["method"] == BASE and interval:
                axes.axvspan(interval.low, interval.high, color="tab:blue", alpha=0.1)
        axes.set_yticks(range(len(own)), [line["method"] for line in own])
        axes.set(title=TASKS[task].about, xlabel="held-out loss (×: not tuned, or one seed)")
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
