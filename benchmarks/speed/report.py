"""From the runs of one machine and precision: a table, a picture, and the numbers behind both."""

import json
import random
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.peers import LADDER, PEERS, RUNGS
from benchmarks.speed.workloads import WORKLOADS
from lorafit.files import write_json, write_text

Record = dict[str, Any]
OURS, BASE = "lorafit", "peft"
ORDER = (*PEERS, *LADDER)
TITLES = {
    "lorafit": "lorafit",
    "seed": "tutorial's layer and loop",
    "peft": "PEFT, plain loop",
    "peft-tuned": "PEFT, tuned loop, padded",
    "peft-packed": "PEFT, tuned loop, packed",
    "trl": "TRL SFTTrainer, defaults",
    "trl-tuned": "TRL SFTTrainer, tuned",
} | {name: f"{rung}: {text}" for rung, (name, text) in enumerate(zip(LADDER, RUNGS, strict=True))}


def read_records(folder: Path, machine: Record, dtype: str, settings: Record) -> list[Record]:
    """The runs in `folder` that may stand in one table."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    alike = {"machine": machine, "dtype": dtype, "settings": settings}
    return [record for record in records if all(record[key] == value for key, value in alike.items())]


def summarise(records: Iterable[Record]) -> list[Record]:
    """One line per workload and peer, in the table's order."""
    runs: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        runs[record["workload"], record["peer"]].append(record)
    order = sorted(runs, key=lambda key: (key[0], ORDER.index(key[1])))
    return [_line(key, runs) for key in order]


def _line(key: tuple[str, str], runs: dict[tuple[str, str], list[Record]]) -> Record:
    workload, peer = key
    mine = runs[key]
    seconds, memory = _all(mine, "seconds"), _memory(mine)
    against = _memory(runs.get((workload, BASE), []))
    return {
        "workload": workload,
        "peer": peer,
        "steps": len(seconds),
        "step_seconds": statistics.median(seconds),
        "real_per_second": statistics.median(_rates(mine, "real")),
        "supervised_per_second": statistics.median(_rates(mine, "supervised")),
        "times_lorafit": ratio(mine, runs.get((workload, OURS), [])),
        "useful_mfu": statistics.median(
            flops / s / run["matrix_peak"]
            for run in mine
            for flops, s in zip(run["useful_flops"], run["seconds"], strict=True)
        ),
        "memory_mb": None if memory is None else memory / 2**20,
        "memory_over_peft": memory / against if memory and against else None,
    }


def ratio(theirs: Sequence[Record], ours: Sequence[Record], resamples: int = 2000) -> Record | None:
    """How many times as long a step takes as ours on the same rows: the median, and its 95 % interval (bootstrap).

    Steps are paired within a round, so that rows of another length do not count as noise.
    """
    rounds = {run["round"]: run["seconds"] for run in ours}
    both = [(run["seconds"], rounds[run["round"]]) for run in theirs if run["round"] in rounds]
    pairs = [a / b for one, other in both for a, b in zip(one, other, strict=True)]
    if not pairs:
        return None
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]
    return {"median": statistics.median(pairs), "low": low, "high": high}


def _all(runs: Sequence[Record], key: str) -> list[float]:
    return [value for run in runs for value in run[key]]


def _rates(runs: Sequence[Record], key: str) -> list[float]:
    return [n / s for run in runs for n, s in zip(run[key], run["seconds"], strict=True)]


def _memory(runs: Sequence[Record]) -> float | None:
    known = [run["memory"] for run in runs if run["memory"] is not None]
    return statistics.median(known) if known else None


def table(lines: Sequence[Record], records: Sequence[Record], refused: dict[str, str] | None = None) -> str:
    """Markdown: one table per workload, and what was measured where."""
    if not lines:
        return "Nothing was measured yet: `python -m benchmarks.speed`."
    parts = []
    for name in sorted({line["workload"] for line in lines}):
        parts.append(f"**{name}**: {WORKLOADS[name].about}.\n\n{_head()}")
        parts[-1] += "\n".join(_row(line) for line in lines if line["workload"] == name)
    return "\n\n".join([*parts, _footnote(records), *_refusals(refused or {})])


def _head() -> str:
    columns = (
        "", "s per step", "times lorafit's (95 %)", "real tok/s", "supervised tok/s", "useful MFU", "memory, MiB",
        "over PEFT's",
    )  # fmt: skip
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"


def _row(line: Record) -> str:
    times, memory, over = line["times_lorafit"], line["memory_mb"], line["memory_over_peft"]
    cells = (
        TITLES[line["peer"]],
        f"{line['step_seconds']:.3g}",
        "{median:.2f} ({low:.2f}–{high:.2f})".format(**times) if times else "–",
        f"{line['real_per_second']:.0f}",
        f"{line['supervised_per_second']:.0f}",
        f"{100 * line['useful_mfu']:.0f} %",
        "–" if memory is None else f"{memory:.0f}",
        "–" if over is None else f"{over:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _footnote(records: Sequence[Record]) -> str:
    one = records[0]
    machine, settings = one["machine"], one["settings"]
    rounds = len({run["round"] for run in records})
    return (
        f"Shape of Qwen1.5-0.5B ({settings['layers']} layers, random weights), {one['dtype']}; medians of {rounds} × "
        f"{settings['steps']} steps. {machine['cpu']}, {machine['capability']}, {machine['threads']} threads, fastest "
        f"matrix product {statistics.median(run['matrix_peak'] for run in records) / 1e9:.0f} GFLOP/s, torch "
        f"{machine['torch']}. Memory is the peak above the loaded model."
    )


def _refusals(refused: dict[str, str]) -> list[str]:
    return [f"Not timed: {TITLES[name]} ({why})." for name, why in refused.items() if why]


def insert(text: str, part: str, mark: str = "speed") -> str:
    """`text` with what stands between its two markers replaced by `part`; behind it all where it has none."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if begin not in text:
        text = f"{text}\n{begin}\n"
    if end not in text:
        text = text.replace(begin, f"{begin}\n{end}", 1)
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{part}\n{end}{rest.split(end, 1)[1]}"


def write(records: Sequence[Record], refused: dict[str, str], results: Path, readme: Path) -> str:
    """The JSON, the picture and README's table; returns the table."""
    lines = summarise(records)
    text = table(lines, records, refused)
    if lines:
        about = {key: records[0][key] for key in ("machine", "dtype", "settings")}
        write_json(results / "speed.json", about | {"refused": refused, "lines": lines})
        draw([line for line in lines if line["peer"] in PEERS], results / "speed.png")
        write_text(readme, insert(readme.read_text(), text))
    return text


def draw(lines: Sequence[Record], path: Path) -> None:
    """Supervised tokens per second, a panel for each workload."""
    from matplotlib.figure import Figure

    names = sorted({line["workload"] for line in lines})
    if not names:
        return
    figure = Figure(figsize=(6.5 * min(2, len(names)), 3.6 * ((len(names) + 1) // 2)), layout="constrained")
    grid = figure.subplots((len(names) + 1) // 2, min(2, len(names)), squeeze=False).flatten()
    for axes, name in zip(grid, names, strict=False):
        part = [line for line in lines if line["workload"] == name][::-1]
        colours = ["tab:blue" if line["peer"] == OURS else "tab:gray" for line in part]
        bars = axes.barh(
            [TITLES[line["peer"]] for line in part], [line["supervised_per_second"] for line in part], color=colours
        )
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set(title=textwrap.fill(f"{name}: {WORKLOADS[name].about}", 50), xlabel="supervised tokens per second")
        axes.title.set_fontsize(9)
        axes.margins(x=0.15)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=150)
