"""TRL's SFTTrainer on rows that are token ids already, timed from the beginning to the end of each of its steps."""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from benchmarks.speed.tasks import Task
from lorafit.model.load import resolve_dtype

CPU = torch.device("cpu")


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds between a step's begin and end: in TRL's favour, the making of its batch is left out."""

    def __init__(self, after: Callable[[int], bool]) -> None:
        self.seconds: list[float] = []
        self.began = 0.0
        self.after = after

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.seconds.append(time.perf_counter() - self.began)
        control.should_training_stop |= self.after(len(self.seconds) - 1)
        return control


def make_trainer(task: Task, peft_config: Any, **changes: Any) -> Any:
    """A trainer that will take the task's rows in their order; no row is cut."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Trainer(SFTTrainer):  # type: ignore[misc]
        """Keeps each step's loss: the log has four digits of it."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            self.losses.append((found[0] if isinstance(found, tuple) else found).detach())
            return found

    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="lorafit-speed-"),
        "per_device_train_batch_size": task.batches.batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": task.setup.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": task.setup.clip,
        "weight_decay": 0.0,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if next(task.model.parameters()).device == CPU:
        settings["use_cpu"] = True
        if resolve_dtype("auto", CPU) is not torch.bfloat16:
            settings["bf16"] = False
    rows = [{"input_ids": row.ids, "labels": row.labels} for row in task.batches.examples]
    trainer = Trainer(
        model=task.model,
        args=SFTConfig(**(settings | changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.losses = []
    return trainer


def settings_of(trainer: Any) -> dict[str, Any]:
    """What decides how fast it is."""
    args = trainer.args
    return {
        "layer": "SFTTrainer(peft_config=…)",
        "rows": "padding_free" if args.padding_free else "packed" if args.packing else "padded",
        "loss": f"loss_type {args.loss_type}",
        "optimizer": getattr(args.optim, "value", args.optim),
        "checkpointing": args.gradient_checkpointing,
        "bf16": args.bf16,
    }


def run(trainer: Any, steps: int, after: Callable[[int], bool]) -> list[tuple[float, float]]:
    """Seconds and loss of each of the first `steps` steps."""
    clock = Clock(after)
    trainer.add_callback(clock)
    trainer.args.max_steps = steps
    trainer.train()
    return list(zip(clock.seconds, (loss.item() for loss in trainer.losses), strict=True))


def _tokenizer() -> Any:
    """SFTTrainer asks for one, if only to know how to pad."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
