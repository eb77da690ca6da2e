"""From the runs of one machine and precision: tables, a picture, and the numbers behind both."""

import random
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.ladder import LADDER, RUNGS
from benchmarks.speed.peers import EXTRA, PEERS
from benchmarks.speed.runs import Record, read_all
from benchmarks.speed.workloads import WORKLOADS
from lorafit.files import write_json, write_text

Runs = Mapping[tuple[str, str], Sequence[Record]]
OURS, BASE = "lorafit", "peft"
ORDER = (*PEERS, *EXTRA, *LADDER)
TITLES = {
    "lorafit": "lorafit",
    "lorafit-compile": "lorafit --compile",
    "lorafit-checkpointing": "lorafit --checkpointing",
    "seed": "tutorial's layer and loop",
    "peft": "PEFT, plain loop",
    "peft-tuned": "PEFT, tuned loop, padded",
    "peft-packed": "PEFT, tuned loop, packed",
    "peft-compiled": "PEFT, tuned loop, padded, compiled",
    "trl": "TRL SFTTrainer, defaults",
    "trl-tuned": "TRL SFTTrainer, tuned",
} | {name: f"{rung}: {text}" for rung, (name, text) in enumerate(zip(LADDER, RUNGS, strict=True))}
PAGE = "speed.md"
OFF = {"float32": 1e-3}
"""How far the loss of a timed step may be from lorafit's, relative to it; in half precision `ROUGH`."""
ROUGH = 2e-2


def read_records(folder: Path, like: Record) -> list[Record]:
    """The runs in `folder` that may stand in one table: those of which all that `like` says is true."""
    return read_all(folder.glob("W*.json"), like)


# --- numbers --------------------------------------------------------------------------------------


def by_peer(records: Iterable[Record]) -> Runs:
    """The runs of each workload and peer, in the table's order, without those that failed."""
    runs: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if "failed" not in record:
            runs[record["workload"], record["peer"]].append(record)
    return {key: runs[key] for key in sorted(runs, key=lambda key: (key[0], ORDER.index(key[1])))}


def summarise(records: Iterable[Record]) -> list[Record]:
    """One line per workload and peer, in the table's order."""
    runs = by_peer(records)
    return [_line(key, runs) for key in runs]


def _line(key: tuple[str, str], runs: Runs) -> Record:
    workload, peer = key
    mine, ours = runs[key], runs.get((workload, OURS), [])
    above, against = _memory(mine, "above"), _memory(runs.get((workload, BASE), []), "above")
    total = _memory(mine, "peak")
    seconds = _all(mine, "seconds")
    found = {
        "workload": workload,
        "peer": peer,
        "steps": len(seconds),
        "step_seconds": spread(seconds),
        "real_per_second": statistics.median(_rates(mine, "real")),
        "supervised_per_second": statistics.median(_rates(mine, "supervised")),
        "times_lorafit": ratio(mine, ours),
        "useful_mfu": statistics.median(
            flops / s / max(run["matrix_peak"].values())
            for run in mine
            for flops, s in zip(run["useful_flops"], run["seconds"], strict=True)
        ),
        "memory_mb": None if above is None else above / 2**20,
        "memory_total_mb": None if total is None else total / 2**20,
        "memory_over_peft": above / against if above and against else None,
        "loss_off": _loss_off(mine, ours),
        "beside_steps": statistics.median(run["beside_steps"] for run in mine),
        "config": mine[0]["config"],
    }
    if "target" in mine[0]:
        reached = [run["seconds_to_target"] for run in mine if run["seconds_to_target"] is not None]
        found["seconds_to_target"] = statistics.median(reached) if len(reached) == len(mine) else None
        found["steps_to_target"] = mine[0]["held_out"][-1][0] if reached else None
    return found


def ratio(theirs: Sequence[Record], ours: Sequence[Record]) -> Record | None:
    """How many times as long a step takes as ours on the same rows: `spread` of the quotients.

    Steps are paired by their number within a round, so that rows of another length do not count as noise.
    """
    rounds = {run["round"]: _numbered(run) for run in ours}
    both = [(_numbered(run), rounds[run["round"]]) for run in theirs if run["round"] in rounds]
    pairs = [one[step] / other[step] for one, other in both for step in one if step in other]
    return spread(pairs) if pairs else None


def _numbered(run: Record) -> dict[int, float]:
    """The seconds of each timed step by its number; the same number means the same rows."""
    return dict(enumerate(run["seconds"], start=run.get("settings", {}).get("warmup", 0)))


def spread(values: Sequence[float], resamples: int = 2000) -> Record:
    """The median, and its 95 % interval (bootstrap)."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]
    return {"median": statistics.median(values), "low": low, "high": high}


def _loss_off(theirs: Sequence[Record], ours: Sequence[Record]) -> float | None:
    """The largest relative difference to lorafit's loss in the first three steps, before roundings have grown."""
    rounds = {run["round"]: run["losses"] for run in ours}
    pairs = [(run["losses"][:3], rounds[run["round"]][:3]) for run in theirs if run["round"] in rounds]
    off = [abs(a - b) / abs(b) for one, other in pairs for a, b in zip(one, other, strict=True)]
    return max(off, default=None)


def _all(runs: Sequence[Record], key: str) -> list[float]:
    return [value for run in runs for value in run[key]]


def _rates(runs: Sequence[Record], key: str) -> list[float]:
    return [n / s for run in runs for n, s in zip(run[key], run["seconds"], strict=True)]


def _memory(runs: Sequence[Record], key: str) -> float | None:
    known = [run["memory"][key] for run in runs if run["memory"][key] is not None]
    return statistics.median(known) if known else None


def rungs(records: Iterable[Record]) -> list[Record]:
    """The ladder: seconds, and what each rung gained over the one below, predicted and measured."""
    runs = {key[1]: found for key, found in by_peer(records).items() if key[1] in LADDER}
    lines, names = [], [name for name in LADDER if name in runs]
    for below, name in zip([None, *names], names, strict=False):
        lines.append(
            {
                "rung": name,
                "step_seconds": spread(_all(runs[name], "seconds")),
                "predicted": _predicted(runs[below], runs[name]) if below else None,
                "measured": ratio(runs[below], runs[name]) if below else None,
                "predicted_in_all": _predicted(runs[names[0]], runs[name]),
                "measured_in_all": ratio(runs[names[0]], runs[name]),
            }
        )
    return lines


def _predicted(slow: Sequence[Record], fast: Sequence[Record]) -> float:
    return sum(_all(slow[:1], "predicted_flops")) / sum(_all(fast[:1], "predicted_flops"))


# --- what is left out, and why --------------------------------------------------------------------


def absent(records: Sequence[Record], refused: Mapping[str, str]) -> dict[str, list[str]]:
    """{workload: sentences} about every peer that has no line, or a run less than others."""
    names = sorted({record["workload"] for record in records})
    there = {(record["workload"], record["peer"]) for record in records}
    found: dict[str, list[str]] = {name: [] for name in names}
    for record in records:
        if "failed" in record:
            found[record["workload"]].append(
                f"{TITLES[record['peer']]}, round {record['round'] + 1}: {record['failed']}"
            )
    for name in names:
        for peer in PEERS:
            if why := refused.get(peer):
                found[name].append(f"{TITLES[peer]}: not timed, {why}")
            elif (name, peer) not in there:
                found[name].append(f"{TITLES[peer]}: not run yet")
    return found


def sound(records: Sequence[Record], refused: Mapping[str, str]) -> tuple[list[Record], dict[str, str]]:
    """The records that may be reported, and every refused peer: by the gate, or by a loss in a timed step."""
    refused = {peer: why for peer, why in refused.items() if why}
    for line in summarise(records):
        most = OFF.get(next(iter(records))["dtype"], ROUGH)
        if line["loss_off"] is not None and not line["loss_off"] <= most:
            refused[line["peer"]] = f"its loss is off by {line['loss_off']:.1e} on {line['workload']}"
    return [record for record in records if record["peer"] not in refused], refused


# --- words ----------------------------------------------------------------------------------------


def table(records: Sequence[Record], refused: Mapping[str, str]) -> str:
    """Markdown: one table per workload, what is missing in it, and what was measured where."""
    lines = [line for line in summarise(records) if line["peer"] not in LADDER]
    if not lines:
        return "Nothing was measured yet: `python -m benchmarks.speed`."
    missing, parts = absent(records, refused), []
    for name in sorted({line["workload"] for line in lines}):
        columns = COLUMNS | (TO_A_LOSS if WORKLOADS[name].lengths is None else {})
        mine = [line for line in lines if line["workload"] == name]
        rows = [[TITLES[line["peer"]], *(cell(line) for cell in columns.values())] for line in mine]
        parts.append(f"**{name}**: {WORKLOADS[name].about}.\n\n{grid(['', *columns], rows)}")
        if missing[name]:
            parts.append(f"Not in this table: {'; '.join(missing[name])}.")
    return "\n\n".join([*parts, _footnote(records)])


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("| --- ", "|---").replace("--- |", "---|") for cells in lines)


def interval(found: Record | None, digits: str = ".2f") -> str:
    return "–" if found is None else "{median:{d}} ({low:{d}}–{high:{d}})".format(**found, d=digits)


def _number(value: float | None, digits: str = ".0f") -> str:
    return "–" if value is None else f"{value:{digits}}"


COLUMNS: dict[str, Callable[[Record], str]] = {
    "s per step": lambda line: interval(line["step_seconds"], ".3g"),
    "times lorafit's": lambda line: interval(line["times_lorafit"]),
    "real tok/s": lambda line: _number(line["real_per_second"]),
    "supervised tok/s": lambda line: _number(line["supervised_per_second"]),
    "useful MFU": lambda line: f"{100 * line['useful_mfu']:.0f} %",
    "memory, MiB": lambda line: _number(line["memory_mb"]),
    "over PEFT's": lambda line: _number(line["memory_over_peft"], ".2f"),
    "in all, MiB": lambda line: _number(line["memory_total_mb"]),
}
TO_A_LOSS: dict[str, Callable[[Record], str]] = {
    "steps to the loss": lambda line: _number(line["steps_to_target"]),
    "s to the loss": lambda line: _number(line["seconds_to_target"]),
}


def _footnote(records: Sequence[Record]) -> str:
    good = [record for record in records if "failed" not in record]
    one = good[0]
    machine, settings = one["machine"], one["settings"]
    peaks = [max(run["matrix_peak"].values()) for run in good]
    moved = max(abs(run["matrix_peak"]["after"] / run["matrix_peak"]["before"] - 1) for run in good)
    said = [
        f"Shape of Qwen1.5-0.5B ({settings['layers']} layers, random weights), {one['dtype']}; medians of "
        f"{_steps_told(good)}, those that warm up before them not counted. "
        f"{machine['cpu']}, {machine['capability']}, {machine['threads']} threads, fastest matrix product "
        f"{statistics.median(peaks) / 1e9:.0f} GFLOP/s (it moved by {100 * moved:.0f} % at most within a run), torch "
        f"{machine['versions']['torch']}. Memory is the peak above the loaded model, and in all. In "
        "brackets: 95 % interval of the median."
    ]
    if not all(run["memory"]["peak_reset"] for run in good):
        said.append("This system keeps the peak of loading: memory may be overstated.")
    if len({run["code"] for run in good if run.get("code")}) > 1:
        said.append("The runs of lorafit are of more than one state of its code.")
    said += sorted({note for run in good for note in run["notes"]})
    return " ".join(said)


def _steps_told(runs: Sequence[Record]) -> str:
    counts = sorted(line["steps"] for line in summarise(runs))
    return f"{counts[0]} steps" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]} steps"


def page(records: Sequence[Record], refused: Mapping[str, str]) -> str:
    """All of it: the tables, the ladder, how each peer is set up, and what it ran on."""
    parts = ["# Speed, side by side", "Made by `python -m benchmarks.speed`.", table(records, refused)]
    if climbed := rungs(records):
        parts += ["## One technique at a time (W1)", LADDER_TEXT, _ladder(climbed)]
    configs = {line["peer"]: line["config"] for line in summarise(records)}
    setups = "\n".join(f"- **{TITLES[peer]}**: {told(config)}" for peer, config in configs.items())
    parts += ["## How each peer is set up", setups]
    machine: Record = next((record["machine"] for record in records), {})
    parts += ["## What it ran on", "\n".join(f"- {key}: {_flat(value)}" for key, value in machine.items()), GATE_TEXT]
    return "\n\n".join(parts) + "\n"


LADDER_TEXT = (
    "Each rung has what the one above it in this table has, and one technique more. Predicted is what the operations "
    "saved are worth, counted from the shapes of model and rows (`ladder.py`): a technique that saves traffic to "
    "memory or calls of the system, and no operation, is predicted 1.00."
)
GATE_TEXT = (
    "Before anything is timed, each peer takes three steps of a tiny model of this shape in fp32, from the same A and "
    "B: the loss of each step has to be lorafit's to 1e-5, the gradient of every A and B to 1e-4 (relative norm). In "
    "the timed runs the losses of the first three steps are compared again."
)


def _ladder(lines: Sequence[Record]) -> str:
    columns = ("s per step", "predicted gain", "measured gain", "predicted in all", "measured in all")
    rows = [
        [
            TITLES[line["rung"]],
            interval(line["step_seconds"], ".3g"),
            _number(line["predicted"], ".2f"),
            interval(line["measured"]),
            _number(line["predicted_in_all"], ".2f"),
            interval(line["measured_in_all"]),
        ]
        for line in lines
    ]
    return grid(["", *columns], rows)


def told(config: Mapping[str, Any]) -> str:
    """A configuration in one line."""
    return "; ".join(f"{key}: {value}" for key, value in config.items())


def _flat(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def insert(text: str, part: str, mark: str = "speed") -> str:
    """`text` with what stands between its two markers replaced by `part`; behind it all where it has none."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if begin not in text:
        text = f"{text}\n{begin}\n"
    if end not in text:
        text = text.replace(begin, f"{begin}\n{end}", 1)
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{part}\n{end}{rest.split(end, 1)[1]}"


def write(records: Sequence[Record], refused: Mapping[str, str], results: Path, readme: Path | None) -> str:
    """The JSON, the page, the picture and README's tables; returns the tables."""
    records, refused = sound(records, refused)
    lines = summarise(records)
    text = table(records, refused)
    if lines:
        about = {key: records[0][key] for key in ("machine", "dtype", "settings")}
        found = {"refused": refused, "lines": lines, "ladder": rungs(records), "absent": absent(records, refused)}
        write_json(results / "speed.json", about | found)
        write_text(results / PAGE, page(records, refused))
        draw([line for line in lines if line["peer"] not in LADDER], results / "speed.png")
        more = f"Every peer's configuration, and each technique's gain: [{PAGE}](benchmarks/results/{PAGE})."
        if readme is not None:
            write_text(readme, insert(readme.read_text(), f"{text}\n\n{more}"))
    return text


def draw(lines: Sequence[Record], path: Path) -> None:
    """Supervised tokens per second, a panel for each workload."""
    from matplotlib.figure import Figure

    names = sorted({line["workload"] for line in lines})
    if not names:
        return
    across = min(2, len(names))
    down = -(-len(names) // across)
    most = max(sum(line["workload"] == name for line in lines) for name in names)
    figure = Figure(figsize=(6.5 * across, (1.4 + 0.3 * most) * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        part = [line for line in lines if line["workload"] == name][::-1]
        colours = ["tab:blue" if line["peer"].startswith(OURS) else "tab:gray" for line in part]
        bars = axes.barh(
            [TITLES[line["peer"]] for line in part], [line["supervised_per_second"] for line in part], color=colours
        )
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set(title=textwrap.fill(f"{name}: {WORKLOADS[name].about}", 50), xlabel="supervised tokens per second")
        axes.title.set_fontsize(9)
        axes.margins(x=0.15)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=150)
