"""The command line: `lorafit VERB --name value …`.

A verb is a function that takes dataclasses: their fields are its flags, its docstring is its help. Added to
`VERBS`, it exists. Everything heavy is imported inside the verb, so that `--help` answers at once.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.app import adapters, merging, options, several, sharing, signals
from lorafit.app.common import OutConfig, base, make_console, need, say, source, with_adapter
from lorafit.config import DataConfig, LoraConfig, ModelConfig, TrainConfig, as_dict, knob
from lorafit.errors import Interrupted, LorafitError, ModelError, UsageError, nearest
from lorafit.world import World

# --- options that only a verb has --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Words that the tokenizer shall know"""

    new_tokens: tuple[str, ...] = knob((), "tokens to add, whose rows are trained, beside --train-tokens")


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """A run that was cut off"""

    resume: bool = knob(False, "go on with the run in --out, with its settings, from its newest whole checkpoint")


@dataclass(frozen=True, kw_only=True)
class FollowConfig:
    """How the run can be followed, and what is kept of it"""

    track: tuple[str, ...] = knob((), "also tell tensorboard, wandb or trackio of each step (where installed)")
    samples: int = knob(3, "rows whose answers without and with the adapter are kept for `lorafit report`")
    sample_tokens: int = knob(64, "longest of these answers in tokens")

    def __post_init__(self) -> None:
        if self.samples < 0 or self.sample_tokens < 0:
            raise UsageError("samples and sample_tokens must not be negative")


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How answers are made"""

    max_new_tokens: int = knob(512, "longest answer in tokens")
    temperature: float = knob(0.0, "0: always the likeliest token; higher: more varied")
    top_p: float = knob(1.0, "draw from the likeliest tokens that together hold this probability")
    top_k: int = knob(0, "draw from this many likeliest tokens; 0: from all")


@dataclass(frozen=True, kw_only=True)
class TalkConfig:
    """The conversation"""

    system: str | None = knob(None, "system message at its beginning")


@dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """What is left to chance"""

    seed: int = knob(0, "which rows are held out")


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """What is shown"""

    rows: int = knob(3, "rows of the data to render")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The built-in demonstration"""

    quick: bool = knob(False, "a few rows and steps only: shows in under a minute that everything runs")
    seed: int = knob(0, "rows, their order, and the start of the adapter")
    out: str = knob("lorafit-demo", "folder to write")


# --- the verbs ---------------------------------------------------------------------------------------


def demo(config: DemoConfig) -> None:
    """Teach a small chat model a skill on this machine, and measure what it learned."""
    from lorafit.app.demo import main

    main(quick=config.quick, seed=config.seed, out=Path(config.out))


def train(
    model: ModelConfig,
    lora: LoraConfig,
    tokens: TokensConfig,
    data: DataConfig,
    training: TrainConfig,
    follow: FollowConfig,
    out: OutConfig,
    again: ResumeConfig,
) -> None:
    """Fine-tune a model on a data file; save the adapter, the settings, the log and the loss curve."""
    need("train", model=model.model, data=data.data, out=out.out)
    if model.adapter and (lora, tokens) != (LoraConfig(), TokensConfig()):
        raise UsageError("an adapter brings its own settings: with --adapter leave the LoRA flags out")
    from lorafit.app import runs
    from lorafit.app.trackers import check_trackers
    from lorafit.files import sweep
    from lorafit.locks import lock
    from lorafit.training.distributed import together

    check_trackers(follow.track)
    folder = Path(out.out)
    with several.connected(model) as here, ExitStack() as held:
        with together(here):
            if here.is_main:
                held.enter_context(lock(folder))
                sweep(folder)
                runs.check_free(folder, again.resume)
        fine_tune(model, lora, tokens, data, training, follow, folder, again.resume, here)


def fine_tune(
    model: ModelConfig,
    lora: LoraConfig,
    tokens: TokensConfig,
    data: DataConfig,
    training: TrainConfig,
    follow: FollowConfig,
    folder: Path,
    resume: bool,
    here: World,
) -> None:
    """What `train` does in `folder`, which is its own; of several processes only the first writes there."""
    import torch

    from lorafit.adapter.peft_format import load_lora
    from lorafit.app import rows, runs, starts
    from lorafit.app.trackers import following
    from lorafit.lora.tokens import enlarge
    from lorafit.model.load import load_model, load_tokenizer
    from lorafit.training import loop
    from lorafit.training.distributed import together

    console = make_console()
    with several.fetching(here, model.model, model.adapter, data.data, data.eval_data):
        tokenizer = load_tokenizer(**source(model), adapter=model.adapter)
        asked = with_tokens(lora, tokens, tokenizer)
        examples, held_out = rows.read_rows(model, data, tokenizer, training.seed)
        net = None if training.shard else load_model(**base(model))[0]
    net = several.sharded(model, here) if net is None else net
    enlarge(net, len(tokenizer) if tokens.new_tokens else 0)
    batches = rows.make_batches(examples, data, seed=training.seed)
    torch.manual_seed(training.seed)  # the start of A
    if model.adapter:
        plan = load_lora(net, model.adapter, force_base=model.force_base)
    else:
        kept_in = folder / runs.CHECKPOINTS if resume else None
        plan = starts.put_in(net, asked, batches, console.print, kept_in=kept_in, here=here)
        lora = replace(plan.config, train_tokens=lora.train_tokens)  # with the ranks that the data asked for
    console.print(f"{plan}\n{rows.summary(examples, held_out)}")
    evaluation = rows.make_batches(held_out, data, shuffle=False) if held_out else None
    settings = as_dict(model, lora, tokens, data, training, follow, OutConfig(out=str(folder)))
    with together(here):
        done = runs.start(folder, settings, resume=resume) if here.is_main else 0
    wiring: dict[str, Any] = {"resume" if resume else "checkpoints": folder / runs.CHECKPOINTS}
    steps = loop.count_steps(training, batches)
    with (
        following(follow.track if here.is_main else (), folder, settings, done, console.print) as tell,
        signals.noted(),
        runs.progress(console, steps, folder / runs.LOG, done, tell) as show,
    ):
        wiring |= {"on_note": console.print, "stop": signals.reason} | ({"on_step": show} if here.is_main else {})
        result = loop.train(net, batches, training, evaluation=evaluation, **wiring)
    leave(folder, net, tokenizer, plan, examples, held_out, settings, here)
    if here.is_main:
        tell_result(console, model.model, data.data, folder, result, batches.steps_per_epoch)


def leave(
    folder: Path, net: Any, tokenizer: Any, plan: Any, rows: Any, held_out: Any, settings: dict[str, Any], here: World
) -> None:
    """Write the adapter of a run that is over, and what is noted about it."""
    from lorafit.adapter.peft_format import save_lora
    from lorafit.app import runs
    from lorafit.app.about import about
    from lorafit.files import write_json

    if here.is_main:
        beside = tokenizer if plan.tokens else None
        save_lora(net, folder / runs.ADAPTER, base_model=settings["model"], tokenizer=beside)
    if here.is_main or settings["shard"]:  # a sharded base is looked at by all processes together
        many = {"count": settings["samples"], "tokens": settings["sample_tokens"]}
        facts = about(net, tokenizer, plan, rows, held_out, settings=settings, **many)
    if here.is_main:
        write_json(folder / runs.ABOUT, facts)


def tell_result(console: Any, model: str, data: str, folder: Path, result: Any, steps_per_epoch: int) -> None:
    """The end of `train`: the curve as a picture, the epochs as a table, and what can be done with it now."""
    from lorafit.app import runs

    runs.draw_losses(result.history, folder / runs.PICTURE, title=f"{model} on {data}")
    console.print(runs.epochs_table(result.epoch_losses, result.evaluations, steps_per_epoch))
    console.print(f"adapter {folder / runs.ADAPTER}, log {folder / runs.LOG}, picture {folder / runs.PICTURE}")
    console.print(f"talk to it: lorafit chat --model {model} --adapter {folder / runs.ADAPTER}")
    console.print(f"show it: lorafit report {folder}")


def evaluate(model: ModelConfig, data: DataConfig, seed: SeedConfig) -> None:
    """Measure the loss on the held-out rows, or on all there are, with and without the adapter."""
    need("eval", model=model.model, data=data.eval_data or data.data)
    from math import exp

    from rich.table import Table

    from lorafit.app import rows
    from lorafit.lora.inject import lora_disabled
    from lorafit.model.load import load_model, load_tokenizer
    from lorafit.training import loop

    with several.connected(model) as here:
        tokenizer = load_tokenizer(**source(model), adapter=model.adapter)
        examples, held_out = rows.read_rows(model, data, tokenizer, seed.seed)
        batches = rows.make_batches(held_out or examples, data, shuffle=False)
        net, _ = load_model(**with_adapter(model))
        passes = loop.plan_passes(net, batches, print, here=here)
        with lora_disabled(net):
            losses = {"base model": loop.evaluate(net, batches, passes=passes, on_note=print)}
        if model.adapter:
            losses["with adapter"] = loop.evaluate(net, batches, passes=passes, on_note=print)
    if not here.is_main:
        return
    table = Table(f"{len(batches.examples):,} rows", "loss per supervised token", "perplexity")
    for name, loss in losses.items():
        table.add_row(name, f"{loss:.4f}", f"{exp(loss):.3f}")
    make_console().print(table)


def chat(model: ModelConfig, talk: TalkConfig, answers: AnswerConfig) -> None:
    """Talk to a model in the terminal, or to the lines of a pipe; /base and /adapter switch in place."""
    need("chat", model=model.model)
    from lorafit.lora.inject import lora_disabled
    from lorafit.model.generate import stream
    from lorafit.model.load import load_model

    net, tokenizer = load_model(**with_adapter(model))
    signals.keyboard()
    opening = [{"role": "system", "content": talk.system}] if talk.system else []
    messages, adapted = list(opening), model.adapter is not None
    commands = ["/base", "/adapter", "/reset", "/quit"]
    say(f"{model.model}{f' with {model.adapter}' if adapted else ''}   {'  '.join(commands)}\n")
    for line in typed():
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(opening)
            say("a new conversation\n")
        elif line == "/adapter" and model.adapter is None:
            say("there is no adapter: start with --adapter\n")
        elif line in ("/base", "/adapter"):
            adapted = line == "/adapter"
            say(f"now with{'' if adapted else 'out'} the adapter\n")
        elif line.startswith("/"):
            say(f"unknown command {line}{nearest(line, commands)}\n")
        else:
            messages.append({"role": "user", "content": line})
            pieces: list[str] = []
            with nullcontext() if adapted else lora_disabled(net):
                try:
                    for piece in stream(net, tokenizer, messages, chat_template=model.chat_template, **asdict(answers)):
                        pieces.append(piece)
                        say(piece)
                except KeyboardInterrupt:
                    say(" …")  # the answer is cut short, the conversation goes on
                except ModelError as error:  # it has grown longer than the model reads
                    say(f"{error} with /reset")
            say("\n")
            messages.append({"role": "assistant", "content": "".join(pieces)})


def inspect(
    model: ModelConfig,
    lora: LoraConfig,
    tokens: TokensConfig,
    data: DataConfig,
    training: TrainConfig,
    show: ShowConfig,
) -> None:
    """Show what would be trained, and on which tokens, before any compute; with --data alone: check the rows."""
    if data.data and not model.model:
        from lorafit.app.rows import counted
        from lorafit.data.check import check_rows

        with counted(f"reading {data.data}") as progress:
            summary = check_rows(data.data, progress=progress)
        return print(summary)
    need("inspect", model=model.model)
    from lorafit.adapter.peft_format import load_lora
    from lorafit.app import rows, starts
    from lorafit.app.memory import estimate
    from lorafit.lora.inits import find_init
    from lorafit.lora.tokens import enlarge
    from lorafit.model.load import load_model, load_skeleton, load_tokenizer, resolve_device

    console = make_console()
    skeleton = load_skeleton(**base(model))
    if tokens.new_tokens or data.data:
        tokenizer = load_tokenizer(**source(model), adapter=model.adapter)
        lora = with_tokens(lora, tokens, tokenizer)
    rows_needed = len(tokenizer) if tokens.new_tokens else 0
    enlarge(skeleton, rows_needed)
    batches = None
    if data.data:
        examples, held_out = rows.read_rows(model, data, tokenizer, training.seed)
        batches = rows.make_batches(examples, data, seed=training.seed)
    init = find_init(lora.init)
    if not model.adapter and (init.start == "kept" or init.statistic):  # what it does is in the weights
        net, _ = load_model(**base(model))
        enlarge(net, rows_needed)
        lora, made = starts.looked_at(net, lora, batches, console.print)
        for line in starts.described(net, lora, made) if init.start == "kept" else ():
            console.print(line)
        del net
    plan = (
        load_lora(skeleton, model.adapter, force_base=model.force_base)
        if model.adapter
        else starts.laid_out(skeleton, lora)
    )
    console.print(str(plan))
    device = resolve_device(model.device)
    if batches is None:
        console.print(estimate(skeleton, data.batch_size * data.max_length, device, training.checkpointing))
    else:
        console.print(estimate(skeleton, rows.largest_pass(batches), device, training.checkpointing))
        console.print(rows.summary(examples, held_out))
        for example in examples[: show.rows]:
            console.print(f"\n{example.source}")
            console.print(rows.rendered(example, tokenizer, colour=console.is_terminal))


VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "chat": chat,
    "merge": merging.merge,
    "inspect": inspect,
    "combine": adapters.combine,
    "resize": adapters.resize,
    "extract": adapters.extract,
    "diff": adapters.diff,
    "export": adapters.export,
    "check": adapters.check,
    "push": sharing.push,
    "report": sharing.report,
}

# --- what they share ---------------------------------------------------------------------------------


def with_tokens(lora: LoraConfig, tokens: TokensConfig, tokenizer: Any) -> LoraConfig:
    """`lora` with the new tokens among those that are trained; `tokenizer` knows them from here on."""
    from lorafit.lora.tokens import know

    ids = (*lora.train_tokens, *know(tokenizer, tokens.new_tokens)) if tokens.new_tokens else lora.train_tokens
    return replace(lora, train_tokens=tuple(dict.fromkeys(ids)))


def typed() -> Iterator[str]:
    """What is typed or piped in, line by line, blank lines left out."""
    by_hand = sys.stdin.isatty()
    if by_hand:
        import readline  # noqa: F401  (gives input() arrow keys and a history)
    while True:
        try:
            line = input("> " if by_hand else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


# --- the entry ---------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's own; returns its exit code."""
    with signals.watched(leaving=arguments is None):
        return answer(list(sys.argv[1:] if arguments is None else arguments))


def answer(arguments: list[str]) -> int:
    """Whatever happens, one line and an exit code."""
    try:
        # A first "--" is for torchrun, which on Python 3.11 takes --r for one of its own options.
        run([argument for argument in arguments[arguments[:1] == ["--"] :] if argument != "--debug"])
    except SystemExit as stopped:  # argparse has printed the help
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        end("interrupted")
        return 130
    except signals.Stopped as stopped:
        end(f"stopped by {stopped}; nothing half done is left behind")
        return Interrupted.exit_code
    except Exception as error:
        if "--debug" in arguments:
            import traceback

            print(without_tokens(traceback.format_exc()), file=sys.stderr)
        if isinstance(error, LorafitError):
            end(str(error))
            return error.exit_code
        end(f"unexpected {type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)")
        return 1
    return 0


def end(why: str) -> None:
    """Say why the command ends: once, however many processes it has."""
    signals.leave()
    if several.speaks():
        print(without_tokens(f"lorafit: {why}"), file=sys.stderr)


def without_tokens(text: str) -> str:
    """`text` without what looks like a hub token: a server may send back what it was told."""
    return re.sub(r"\bhf_\w{4,}", "***", text)


def run(arguments: list[str]) -> None:
    """Find the verb, read its options, do it."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        from importlib.metadata import version

        print(f"lorafit {version('lorafit')}")
    elif name in VERBS:
        several.check(name)
        known = {key for verb in VERBS.values() for key in options.names(verb)}
        VERBS[name](**options.read(name, VERBS[name], rest, known, settings_file))
    else:
        raise UsageError(f"unknown verb '{name}'{nearest(name, VERBS)}: there are {', '.join(VERBS)}")


def settings_file(given: Mapping[str, str]) -> str | None:
    """The settings of a run that is resumed, where no --config is given: the ones that stand in its folder."""
    file = Path(given.get("out", "")) / "config.yaml"
    return str(file) if given.get("resume") == "true" and "out" in given and file.is_file() else None


def usage() -> str:
    """What `lorafit --help` prints."""
    verbs = "\n".join(f"  {name:9}{verb.__doc__}" for name, verb in VERBS.items())
    return f"""usage: lorafit VERB --name value …

{verbs}

lorafit VERB --help lists its options. They can also stand in a TOML or YAML file, given with --config.
With --debug an error shows where it came from."""
