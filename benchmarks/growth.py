"""How a step's time and memory grow: with the length of a row, the rank, the share of tokens with loss, the layers.

    python -m benchmarks.growth                    # about 12 minutes on two cores
    python -m benchmarks.growth --axis rank --peers lorafit
    python -m benchmarks.growth --quick            # a tiny model, a few points: whether it works
    python -m benchmarks.growth --table            # the page again, from the points that there are

Everything else is held at `MIDDLE` (a smaller vocabulary and fewer layers than the model whose shape it has, so that
a point takes seconds). Each point is a process of its own; one that is there already is not made again. The figures go
to results/growth, the curves and tables into docs/cost.md.
"""

import argparse
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.speed.ladder import TECHNIQUES, Shape, predicted_flops
from benchmarks.speed.measure import machine
from benchmarks.speed.peers import PEERS
from benchmarks.speed.report import TITLES, grid, insert
from benchmarks.speed.run import measured, precision
from benchmarks.speed.runs import ROOT, Record, alike, code, read_all, run_once
from benchmarks.speed.tasks import Task
from benchmarks.speed.workloads import Setup, make_model
from lorafit import Batches
from lorafit.data.chat import IGNORE, Example
from lorafit.files import write_json, write_text

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "cost.md"


@dataclass(frozen=True)
class Point:
    """One step: `rows` rows of `length` tokens, `share` of which carry loss."""

    rows: int = 4
    length: int = 128
    rank: int = 16
    share: float = 0.4
    layers: int = 6


MIDDLE = Point()
AXES: dict[str, tuple[str, list[Point]]] = {
    "length": ("tokens in the row (one row a step)", [Point(1, n) for n in (128, 256, 512, 1024, 2048, 4096)]),
    "rank": ("rank", [replace(MIDDLE, rank=r) for r in (1, 4, 16, 64, 128, 256)]),
    "share": ("share of tokens with loss", [replace(MIDDLE, share=s) for s in (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)]),
    "layers": ("layers", [replace(MIDDLE, layers=n) for n in (1, 2, 4, 8, 16, 24)]),
}
VOCABULARY = 32768
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def main() -> None:
    asked = _arguments()
    if asked.out:
        _one(asked)
        return
    console = Console(highlight=False, soft_wrap=True)
    results = ROOT / "runs" / "benchmarks" if asked.quick else RESULTS
    folder = results / "growth"
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(precision(asked.dtype)).removeprefix("torch.")
    like = {"dtype": dtype, "steps": asked.steps, "quick": asked.quick, "machine": machine(asked.threads)}
    plan = [(axis, point, peer) for axis in asked.axis for point in _points(axis, asked.quick) for peer in asked.peers]
    for number, (axis, point, peer) in enumerate([] if asked.table else plan, 1):
        label = f"[{number}/{len(plan)}] {peer} {axis} {_value(axis, point):g}"
        what = asdict(point) | {"peer": peer}
        flags = what | {"steps": asked.steps, "dtype": dtype, "threads": asked.threads, "quick": asked.quick}
        mine = {"code": code(["src/lorafit"])} if peer.startswith("lorafit") else {}
        with console.status(label):
            found, there = run_once("benchmarks.growth", flags, folder / _name(point, peer), what | like | mine)
        said = found.get("failed") or f"{statistics.median(found['seconds']):.3f} s{', was there' if there else ''}"
        console.print(f"{label}: {said}", markup=False)
    report(read_all(folder.glob("*.json"), like), results, PAGE if not asked.quick else None)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["lorafit", "peft"])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a point")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true", help="run nothing, only report")
    one = parser.add_argument_group("one point, in this process")
    one.add_argument("--out", type=Path)
    one.add_argument("--peer", choices=PEERS)
    for field in fields(Point):
        one.add_argument(f"--{field.name}", type=type(field.default))
    return parser.parse_args()


def _one(asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    point = Point(**{field.name: getattr(asked, field.name) for field in fields(Point)})
    write_json(asked.out, measure_point(point, asked.peer, asked.steps, precision(asked.dtype), asked.quick))


def _points(axis: str, quick: bool) -> list[Point]:
    points = AXES[axis][1]
    return [replace(point, layers=min(2, point.layers)) for point in points[:2]] if quick else points


def _name(point: Point, peer: str) -> str:
    return "-".join(f"{value:g}" for value in asdict(point).values()) + f"-{peer}.json"


def _value(axis: str, point: Point) -> float:
    return float(asdict(point)[axis])


def measure_point(point: Point, peer: str, steps: int, dtype: torch.dtype, quick: bool) -> Record:
    """What `measured` says of one point, and how many operations its step takes."""
    model = make_model(point.layers, dtype, vocab_size=VOCABULARY, **(TINY if quick else {}))
    rows, setup = make_point_rows(point, point.rows * (steps + 1)), Setup(r=point.rank, alpha=2.0 * point.rank)
    flops = predicted_flops(Shape.of(model), rows[: point.rows], setup, frozenset(TECHNIQUES))
    task = Task(model, Batches(rows, point.rows, shuffle=False), setup)
    return measured(task, PEERS[peer], steps, warmup=1) | {"predicted_flops": flops}


def make_point_rows(point: Point, count: int) -> list[Example]:
    """Rows of noise; the last `share` of each carries loss."""
    draw = random.Random(0)
    prompt = point.length - max(1, round(point.share * point.length))
    rows = []
    for _ in range(count):
        ids = [draw.randrange(VOCABULARY) for _ in range(point.length)]
        rows.append(Example(ids, [IGNORE] * prompt + ids[prompt:], "growth"))
    return rows


# --- the report -----------------------------------------------------------------------------------


def curves(points: Sequence[Record]) -> list[Record]:
    """One line per axis, peer and value: seconds, what the operations alone would take, and MiB above the model."""
    lines = []
    quick = any(found.get("quick") for found in points)
    for axis in AXES:
        for point in _points(axis, quick):
            alike_points = [found for found in points if alike(found, asdict(point))]
            for found in sorted(alike_points, key=lambda one: list(PEERS).index(one["peer"])):
                line = {"axis": axis, "peer": found["peer"], "value": _value(axis, point)}
                if "failed" in found:
                    lines.append(line | {"failed": found["failed"]})
                    continue
                above = found["memory"]["above"]
                lines.append(
                    line
                    | {
                        "seconds": statistics.median(found["seconds"]),
                        "least": found["predicted_flops"] / max(found["matrix_peak"].values()),
                        "memory_mb": None if above is None else above / 2**20,
                    }
                )
    return lines


def report(points: Sequence[Record], results: Path, page: Path | None) -> None:
    """The numbers, the picture, and both in the page."""
    lines = curves(points)
    if not lines:
        print("Nothing was measured yet: python -m benchmarks.growth")
        return
    about = {key: points[0][key] for key in ("dtype", "machine", "steps")}
    write_json(results / "growth.json", about | {"lines": lines})
    draw(lines, results / "growth.png")
    text = table(lines, points[0])
    print(text)
    if page is not None:
        write_text(page, insert(page.read_text(), text, "growth"))


def table(lines: Sequence[Record], one: Record) -> str:
    """Markdown: a table per axis."""
    parts = []
    for axis, (title, _) in AXES.items():
        peers = sorted({line["peer"] for line in lines if line["axis"] == axis}, key=list(PEERS).index)
        cells = {(line["value"], line["peer"]): line for line in lines if line["axis"] == axis}
        head = [title, "s, operations alone"]
        head += [f"{TITLES[peer]}: {what}" for peer in peers for what in ("s per step", "MiB above the model")]
        rows = []
        for value in sorted({value for value, _ in cells}):
            known = [cells[value, peer] for peer in peers if (value, peer) in cells]
            least = [line["least"] for line in known if "least" in line]
            row = [f"{value:g}", f"{statistics.median(least):.3g}" if least else "–"]
            for peer in peers:
                line = cells.get((value, peer), {"failed": "–"})
                if "failed" in line:
                    row += [line["failed"], "–"]
                else:
                    row += [f"{line['seconds']:.3g}", _mib(line["memory_mb"])]
            rows.append(row)
        if rows:
            parts.append(grid(head, rows))
    machine = one["machine"]
    note = (
        f"Unless it is the axis: {MIDDLE.rows} rows of {MIDDLE.length} tokens, {MIDDLE.share:.0%} of them with loss, "
        f"rank {MIDDLE.rank}, {MIDDLE.layers} layers of Qwen1.5-0.5B's shape with {VOCABULARY:,} words; "
        f"{one['dtype']}, medians of {one['steps']} steps. {machine['cpu']}, {machine['threads']} threads, torch "
        f"{machine['versions']['torch']}. The second column is lorafit's operations at the speed of the fastest "
        "matrix product in the same process."
    )
    return "\n\n".join([*parts, note])


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def draw(lines: Sequence[Record], path: Path) -> None:
    """A column per axis: seconds above, memory below; dashed what the operations alone would take."""
    from matplotlib.figure import Figure

    axes_there = [axis for axis in AXES if any(line["axis"] == axis for line in lines)]
    figure = Figure(figsize=(3.8 * len(axes_there), 6.4), layout="constrained")
    panels = figure.subplots(2, len(axes_there), squeeze=False)
    for column, axis in enumerate(axes_there):
        mine = [line for line in lines if line["axis"] == axis and "failed" not in line]
        for peer in sorted({line["peer"] for line in mine}, key=list(PEERS).index):
            part = [line for line in mine if line["peer"] == peer]
            x = [line["value"] for line in part]
            (drawn,) = panels[0, column].plot(x, [line["seconds"] for line in part], "o-", label=TITLES[peer])
            if peer == "lorafit":
                panels[0, column].plot(
                    x, [line["least"] for line in part], "--", color=drawn.get_color(), label="its operations alone"
                )
            panels[1, column].plot(x, [line["memory_mb"] or 0 for line in part], "o-", label=TITLES[peer])
        for row, what in enumerate(("seconds per step", "MiB above the loaded model")):
            panel = panels[row, column]
            panel.set(xlabel=AXES[axis][0], ylabel=what if column == 0 else "", ylim=(0, None))
            if axis in ("length", "rank"):
                panel.set_xscale("log", base=2)
            if axis == "length":
                panel.set(yscale="log", ylim=(None, None))
            panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
