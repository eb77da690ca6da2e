"""A tokenizer made on the spot: one token per byte, plus the control tokens that are asked for."""

import re
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = r"<\|[^<>|]*\|>|<｜[^<>｜]*｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z_]+\]"
TAG = r"</?[a-z_]+>"


def make_tokenizer(template: str | None = CHATML, bos: str | None = "<s>", eos: str | None = "</s>") -> Any:
    """Bytes as tokens; the control tokens in `template` are special, its tags (<think>) are added but not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    text = template or ""
    special = sorted({*re.findall(CONTROL, text), "<|im_start|>", "<|im_end|>"})
    tags = sorted(set(re.findall(TAG, text)) - {bos, eos})
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def byte_tokenizer() -> Any:
    """`byte_tokenizer(template)`: see `make_tokenizer`."""
    return make_tokenizer


def marked(example: Any, tokenizer: Any) -> str:
    """The text of an example with what carries loss in ⟦ ⟧."""
    text, at, inside = "", 0, False
    for i in range(len(example.ids) + 1):
        learns = i < len(example.ids) and example.labels[i] >= 0
        if i == len(example.ids) or learns != inside:
            text += tokenizer.decode(example.ids[at:i])
            text += "⟦" if learns else "⟧" if inside else ""
            at, inside = i, learns
    return text


@pytest.fixture
def show() -> Any:
    """`show(example, tokenizer)`: see `marked`."""
    return marked
