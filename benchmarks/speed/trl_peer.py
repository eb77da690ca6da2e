"""TRL's SFTTrainer on rows that are token ids already, timed from the beginning to the end of each of its steps."""

import tempfile
import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from benchmarks.speed.workloads import CLIP, LR
from lorafit import Batches
from lorafit.model.load import resolve_dtype

CPU = torch.device("cpu")


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds between a step's begin and end: in TRL's favour, the making of its batch is left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def make_trainer(model: nn.Module, batches: Batches, peft_config: Any, **changes: Any) -> Any:
    """A trainer that will take the rows of `batches` in their order; no row is cut."""
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
        "per_device_train_batch_size": batches.batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "weight_decay": 0.0,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    if resolve_dtype("auto", CPU) is not torch.bfloat16:
        settings["bf16"] = False
    rows = [{"input_ids": row.ids, "labels": row.labels} for row in batches.examples]
    trainer = Trainer(
        model=model,
        args=SFTConfig(**(settings | changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.losses = []
    return trainer


def run(trainer: Any, steps: int) -> list[tuple[float, float]]:
    """Seconds and loss of each of the first `steps` steps."""
    clock = Clock()
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
