"""The model card of an adapter or a merged model, made from its run."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit import __version__
from lorafit.adapter.check import lora_rank_flag
from lorafit.app.runs import PICTURE, PastRun
from lorafit.hub import ON_HUB

FILES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz", ".txt", ".gguf", ".jinja")
"""Endings of files: what is called so is none of the hub's names, though it may look like one."""


@dataclass(frozen=True)
class Subject:
    """What the card is about: the base model's name, the adapter's configuration (None: a merged model), and what
    vLLM would refuse in it."""

    base: str
    config: Mapping[str, Any] | None
    refused: Sequence[str] = ()


def public_name(name: str, local: bool = False) -> str:
    """What others may know of where a model or data set came from: its name on the hub, or the end of its path.

    `local`: it is known to have been a path, whatever there is now.
    """
    plain = name.partition(":")[0]
    here = local or Path(plain).expanduser().exists() or Path(plain).suffix in FILES
    return name if ON_HUB.fullmatch(plain) and not here else Path(name).name


def make_card(subject: Subject, run: PastRun | None, repo: str, license: str | None, picture: bool) -> str:
    """README.md for `repo`: front matter that the hub reads, and what a reader wants to know."""
    parts = [
        front_matter(subject, run, license),
        f"# {repo.partition('/')[2]}",
        opening(subject),
        *([training(run, picture)] if run else []),
        usage(subject, repo),
        "## Licence\n\n" + (f"{license}." if license else "Not stated yet. The base model's licence holds as well."),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(subject: Subject, run: PastRun | None, license: str | None) -> str:
    """The lines between `---` and `---`. What the hub would not find by its name is left out."""
    import yaml

    adapter = subject.config is not None
    data = run_name(run, "data").partition(":")[0] if run else ""
    fields = {
        "base_model": subject.base if ON_HUB.fullmatch(subject.base) else None,
        "base_model_relation": ("adapter" if adapter else "finetune") if ON_HUB.fullmatch(subject.base) else None,
        "datasets": [data] if ON_HUB.fullmatch(data) else None,
        "library_name": "peft" if adapter else "transformers",
        "license": license,
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorafit"],
    }
    lines = yaml.safe_dump({name: value for name, value in fields.items() if value}, sort_keys=False)
    return f"---\n{lines}---"


def opening(subject: Subject) -> str:
    base = subject.base or "its base model"
    if ON_HUB.fullmatch(base):
        base = f"[{base}](https://huggingface.co/{base})"
    if subject.config is None:
        return f"{base}, fine-tuned with LoRA by lorafit {__version__}; the adapter is merged into the weights."
    formula = "DoRA" if subject.config.get("use_dora") else "LoRA"
    return (
        f"A {formula} adapter for {base}, made with lorafit {__version__}, in PEFT's format: rank "
        f"{subject.config['r']}, alpha {subject.config['lora_alpha']}."
    )


def training(run: PastRun, picture: bool) -> str:
    """Data, settings, curve and evaluation of a run."""
    parts = ["## Training", table(figures(run))]
    if picture:
        parts.append(f"![loss of each step]({PICTURE})")
    if run.evaluations:
        parts += ["## Evaluation", table(evaluation(run))]
    parts += ["<details><summary>All settings</summary>", f"```yaml\n{settings(run)}```", "</details>"]
    return "\n\n".join(parts)


def figures(run: PastRun) -> dict[str, str]:
    """What a run was, in a few rows."""
    data = run.about.get("data", {})
    rows = {
        "data": run_name(run, "data"),
        "rows": f"{data['rows']:,} to train on, {data['held_out']:,} held out" if data else "",
        "tokens": f"{data['tokens']:,}, of which {data['supervised']:,} carry loss" if data else "",
        "steps": f"{len(run.records):,}",
        "rows per step": f"{run.settings.get('batch_size', 1) * run.settings.get('accumulate', 1)}",
        "learning rate": f"{run.settings.get('lr')}, {run.settings.get('schedule')}",
        "last loss per supervised token": f"{run.losses[-1][1]:.4f}" if run.losses else "",
    }
    return {name: value for name, value in rows.items() if value}


def evaluation(run: PastRun) -> dict[str, str]:
    """The held-out losses: the first, the best and the last."""
    best = min(run.evaluations, key=lambda step: run.evaluations[step])
    steps = sorted({min(run.evaluations), best, max(run.evaluations)})
    return {
        f"held-out loss after step {step + 1}": (
            f"{run.evaluations[step]:.4f} (perplexity {math.exp(min(run.evaluations[step], 700)):.4g})"
            + (", the best" if step == best else "")
        )
        for step in steps
    }


def settings(run: PastRun) -> str:
    """The settings as lines of YAML."""
    import yaml

    return str(yaml.safe_dump(public_settings(run.settings, run.local), sort_keys=False, allow_unicode=True))


def public_settings(settings: Mapping[str, Any], local: Collection[str] = ()) -> dict[str, Any]:
    """The settings as they were, without paths of the machine they were used on; `local` are known to hold one."""
    places = ("model", "data", "eval_data", "adapter", "chat_template")
    return {
        name: public_name(value, name in local) if name in places and isinstance(value, str) else value
        for name, value in settings.items()
        if name != "out"
    }


def run_name(run: PastRun, setting: str) -> str:
    """What others may know of one setting."""
    return public_name(str(run.settings.get(setting) or ""), setting in run.local)


def table(rows: Mapping[str, str]) -> str:
    """A table of two columns in Markdown."""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


# --- how to load it ----------------------------------------------------------------------------------


def usage(subject: Subject, repo: str) -> str:
    """How each program loads it, or why it does not."""
    if subject.config is None:
        return f"""## Use

```sh
lorafit chat --model {repo}
vllm serve {repo}
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```"""
    base = subject.base or "BASE_MODEL"
    return f"""## Use

```sh
lorafit chat --model {base} --adapter {repo}
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
```

With transformers alone (PEFT has to be installed):

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model.load_adapter("{repo}")
```

{vllm(subject, repo)}"""


def vllm(subject: Subject, repo: str) -> str:
    """The command with the `--max-lora-rank` it needs, or why vLLM refuses the adapter."""
    config = subject.config or {}
    flag = lora_rank_flag(max([config["r"], *(config.get("rank_pattern") or {}).values()]))
    if subject.refused or flag is None:
        why = "; ".join(subject.refused)
        return f"vLLM does not load it as it is ({why}): merge it (`lorafit merge`) and serve the model."
    base, name = subject.base or "BASE_MODEL", repo.partition("/")[2]
    return f"""With vLLM:

```sh
vllm serve {base} --enable-lora --max-lora-rank {flag} --lora-modules {name}={repo}
```"""
