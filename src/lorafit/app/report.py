"""`lorafit report`: a run on one HTML page that can be sent to somebody.

The page asks for nothing: style and pictures are in it, scripts there are none, and its own security policy forbids
any request. It is light or dark as its reader's screen is. What a run did not keep, the page says.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lorafit import __version__
from lorafit.app import charts
from lorafit.app.card import evaluation, figures, public_settings, run_name
from lorafit.app.charts import Line
from lorafit.app.runs import PastRun
from lorafit.config import DataConfig, LoraConfig, ModelConfig, TrainConfig, as_dict
from lorafit.files import write_text

MOST_ROWS = 40  # kinds of layers in a heat map
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c1e21; --faint: #5d6470; --line: #d9dde3; --box: #f5f6f8;
  --one: #1f6feb; --two: #c2570c; --heat: #e8872b; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --text: #e8eaee; --faint: #a3abb8; --line: #363c46;
  --box: #1e2127; --one: #6ea8ff; --two: #ffa657; --heat: #9c4a0a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p, figure { margin: .5rem 0; }
.faint, figcaption { color: var(--faint); font-size: .9rem; }
.missing { border-left: 3px solid var(--line); padding-left: .75rem; color: var(--faint); }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
dl.tiles div { background: var(--box); border-radius: .5rem; padding: .7rem .9rem; }
dl.tiles dt { color: var(--faint); font-size: .85rem; }
dl.tiles dd { margin: .1rem 0 0; font-size: 1.25rem; font-weight: 600; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td, th { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
td:first-child { color: var(--faint); width: 17rem; }
pre, .said { background: var(--box); border-radius: .5rem; padding: .75rem .9rem; margin: .35rem 0; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .88rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .75rem; }
.answers h4 { margin: .5rem 0 0; font-size: .85rem; color: var(--faint); font-weight: 600; }
.right { border-left: 4px solid var(--one); }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--text); font-size: 12px; } svg .in { text-anchor: middle; } svg .row { text-anchor: end; }
svg .grid { stroke: var(--line); } polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.light { stroke: var(--one); stroke-opacity: .35; stroke-width: 1; } polyline.one { stroke: var(--one); }
polyline.two { stroke: var(--two); } circle.two { fill: var(--two); } circle.one, circle.light { fill: var(--one); }
.key.light { fill: var(--one); fill-opacity: .35; } .key.one, .bar0 { fill: var(--one); }
.key.two, .bar1 { fill: var(--two); } .cell { fill: var(--heat); }
"""


def page(run: PastRun) -> str:
    """The whole page."""
    name, data = (run_name(run, setting) or "?" for setting in ("model", "data"))
    title = f"{name} on {data}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">A training run of lorafit {escape(str(run.about.get("lorafit", "")))}</p>',
        tiles(run),
        section("Loss", losses(run)),
        section("Answers before and after", answers(run)),
        section("What changed in each layer", layers(run)),
        section("Data", data_part(run)),
        section("The plan", plan(run)),
        section("The course of training", course(run)),
        section("Settings", settings(run)),
        f'<p class="faint">Made by lorafit {__version__}. This page loads nothing and runs no scripts.</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def write_report(run: PastRun, out: Path) -> None:
    """Write the page to `out`."""
    write_text(out, page(run))


# --- its parts ---------------------------------------------------------------------------------------


def tiles(run: PastRun) -> str:
    """The run in a few numbers."""
    plan, data, held_out = run.about.get("plan"), run.about.get("data"), run.evaluations
    share = 100 * plan["trainable"] / max(plan["total"], 1) if plan else 0
    first, last = (run.losses[0][1], run.losses[-1][1]) if run.losses else (None, None)
    facts = {
        "trained parameters": plan and f"{plan['trainable']:,} ({share:.2g} %)",
        "rows": data and f"{data['rows']:,}",
        "steps": f"{len(run.records):,}",
        "training loss, first → last step": first is not None and f"{first:.3f} → {last:.3f}",
        "held-out loss, first → best": held_out
        and f"{held_out[min(held_out)]:.3f} → {min(held_out.values()):.3f}",
    }
    shown = [f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value]
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def losses(run: PastRun) -> str:
    """The loss of each step, its running mean, and the held-out loss."""
    if not run.losses:
        return missing("no step of this run was taken, or its log is gone (log.jsonl)")
    values = [loss for _, loss in run.losses]
    span = max(1, min(50, len(values) // 10))
    mean = [sum(values[max(0, i - span + 1) : i + 1]) / min(i + 1, span) for i in range(len(values))]
    steps = [step + 1 for step, _ in run.losses]
    lines = [
        Line("each step", list(zip(steps, values, strict=True)), "light"),
        Line(f"mean of {span}", list(zip(steps, mean, strict=True)), "one"),
        Line("held out", [(step + 1, loss) for step, loss in run.evaluations.items()], "two", dots=True),
    ]
    caption = "Loss per supervised token."
    if len(values) > charts.MOST_POINTS:
        caption += f" Of {len(values):,} steps, neighbours are drawn as one point."
    if skipped := len(run.records) - len(values):
        caption += f" {skipped} steps were not taken: their loss or gradient was not finite."
    picture = figure(charts.curves(lines, "step", "loss"), caption)
    held_out = run.about.get("data", {}).get("held_out")
    none = "the held-out rows were not measured while training" if held_out else "no rows were held out (--eval-rows)"
    return picture + (table(evaluation(run)) if run.evaluations else missing(none))


def answers(run: PastRun) -> str:
    """What the model says without and with the adapter, to rows of the data; and what was measured of its answers."""
    samples = run.about.get("samples")
    if not samples:
        why = "the run kept no answers (--samples 0, rows without answers, an older lorafit, or it was not finished)"
        return missing(run.about.get("no_samples") or why)
    parts = []
    for sample in samples:
        columns = [
            f'<div><h4>{name}</h4><div class="said{" right" if key == "after" else ""}">{said(sample[key])}</div></div>'
            for name, key in (("base model", "before"), ("with adapter", "after"), ("in the data", "answer"))
        ]
        head = f"<h3>{escape(str(sample['source']).rpartition('/')[2])}</h3><pre>{escape(sample['prompt'])}</pre>"
        parts.append(f'{head}<div class="answers">{"".join(columns)}</div>')
    note = "The likeliest answer, token by token; long ones are cut."
    return f'<p class="faint">{note}</p>{table(run.about.get("measured", {}))}{"".join(parts)}'


def layers(run: PastRun) -> str:
    """Two heat maps: how large the update is beside the weight, and in how many directions it goes."""
    found = run.about.get("layers")
    if not found:
        return missing("the run kept no figures of its layers (made by an older lorafit, or not finished)")
    size = "‖ΔW‖ / ‖W‖ in per cent, by kind of layer and block"
    rank = f"Effective rank of ΔW (Roy and Vetterli 2007), at most r = {max(layer['r'] for layer in found)}"
    return (
        heat(found, "share", size, lambda value: f"{100 * value:.2g}")
        + heat(found, "effective_rank", rank, "{:.1f}".format)
        + ('<p class="faint">The low-rank part alone, without DoRA\'s magnitudes.</p>' if _is_dora(run) else "")
    )


def heat(found: Sequence[Mapping[str, Any]], key: str, caption: str, form: Callable[[float], str]) -> str:
    """A figure of values by kind of layer and block; layers of one kind in one block (experts) as their mean."""
    cells: dict[tuple[str, str], list[float]] = {}
    for layer in found:
        cells.setdefault(place(layer["layer"]), []).append(float(layer[key]))
    kinds = list(dict.fromkeys(kind for kind, _ in cells))[:MOST_ROWS]
    blocks = sorted({block for _, block in cells}, key=lambda block: (len(block), block) if block != "–" else (99, ""))
    means = {at: sum(values) / len(values) for at, values in cells.items() if at[0] in kinds}
    picture = charts.heat(means, kinds, blocks, form, caption)
    return figure(picture, f"{caption}: from {form(min(means.values()))} to {form(max(means.values()))}.")


def place(layer: str) -> tuple[str, str]:
    """("self_attn.q_proj", "3") of model.layers.3.self_attn.q_proj; "–" is the block of what is in none."""
    found = re.match(r"(?:.*?\.)?(\d+)\.(.+)", layer)
    kind, block = (found[2], found[1]) if found else (layer, "–")
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", kind), block


def data_part(run: PastRun) -> str:
    """Counts, and how long the rows are."""
    rows = table(figures(run))
    lengths = run.about.get("data", {}).get("lengths")
    if not lengths:
        return rows + missing("the run kept no statistics of its data (made by an older lorafit, or not finished)")
    groups = {"all tokens": lengths["rows"], "those that carry loss": lengths["supervised"]}
    return rows + figure(charts.bars(lengths["edges"], groups, "tokens", "rows"), "How long the training rows are.")


def plan(run: PastRun) -> str:
    """What was adapted, as `train` printed it."""
    text = run.about.get("plan", {}).get("text")
    return f"<pre>{escape(text)}</pre>" if text else missing("the run was not finished, or made by an older lorafit")


def course(run: PastRun) -> str:
    """Learning rate, gradient norm and speed."""
    names = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}
    pictures = []
    for key, name in names.items():
        points = [(r["step"] + 1, r[key]) for r in run.records if r.get(key) is not None and math.isfinite(r[key])]
        if points:
            pictures.append(figure(charts.curves([Line(name, points, "one")], "step", name), ""))
    return "".join(pictures) or missing("its log is gone (log.jsonl)")


def settings(run: PastRun) -> str:
    """Every setting; those that are not the default come first, in bold."""
    defaults = as_dict(ModelConfig(), LoraConfig(), DataConfig(), TrainConfig())
    given = public_settings(run.settings, run.local)
    changed = {name: value for name, value in given.items() if name in defaults and value != defaults[name]}
    rest = {name: value for name, value in given.items() if name not in changed}
    rows = [f"<tr><td>{escape(n)}</td><td><strong>{said(v)}</strong></td></tr>" for n, v in changed.items()]
    rows += [f"<tr><td>{escape(n)}</td><td>{said(v)}</td></tr>" for n, v in rest.items()]
    about = {"torch": run.about.get("torch"), **run.about.get("model", {})}
    versions = ", ".join(f"{name} {value}" for name, value in about.items() if value)
    return f'<table>{"".join(rows)}</table><p class="faint">Bold: not the default. {escape(versions)}</p>'


# --- their pieces ------------------------------------------------------------------------------------


def section(title: str, inside: str) -> str:
    return f"<section><h2>{title}</h2>{inside}</section>"


def figure(picture: str, caption: str) -> str:
    return f'<figure><div class="scroll">{picture}</div><figcaption>{escape(caption)}</figcaption></figure>'


def missing(what: str) -> str:
    return f'<p class="missing">Not shown: {escape(what)}.</p>'


def table(rows: Mapping[str, str]) -> str:
    return f"<table>{''.join(f'<tr><td>{escape(n)}</td><td>{escape(v)}</td></tr>' for n, v in rows.items())}</table>"


def said(value: Any) -> str:
    """A value for a reader; nothing is a dash."""
    return escape(str(value)) if value not in ("", None, [], {}) else "–"


def _is_dora(run: PastRun) -> bool:
    return run.settings.get("variant") == "dora"
