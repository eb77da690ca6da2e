"""The comparison of an adapter and its merge tells the truth about a difference that is known."""

from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorafit.model.compare import compare, probe


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, no template: prompts are continued."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_a_model_agrees_with_itself(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama", vocab_size=256, eos_token_id=None)
    before = probe(model, tokenizer, ["ab", "hello"], max_new_tokens=5)
    assert [len(row) for row in before.rows] == [2 + 5, 5 + 5]
    found = compare(before, probe(model, tokenizer, like=before))
    assert (found.largest, found.agreeing, found.tokens) == (0, 12, 12)


def test_a_known_difference_is_found(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama", vocab_size=256, eos_token_id=None, tie_word_embeddings=False).train()
    before = probe(model, tokenizer, ["ab", "hello"], max_new_tokens=5)
    with torch.no_grad():
        model.lm_head.weight.mul_(-2)  # every logit turns to minus twice itself: another token wins everywhere
    found = compare(before, probe(model, tokenizer, like=before))
    assert found.agreeing == 0
    assert found.largest == pytest.approx(3 * found.scale, rel=1e-5)
    assert found.scale == pytest.approx(before.logits.abs().max().item())
    assert "same greedy token at 0 of 12 positions" in str(found)
    assert model.training


def test_the_logits_are_those_that_chose_the_answer(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama", vocab_size=256, eos_token_id=None)
    found = probe(model, tokenizer, ["hello"], max_new_tokens=6)
    assert found.logits.argmax(-1)[:-1].tolist() == list(found.rows[0][found.starts[0] :])
