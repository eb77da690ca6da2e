"""Trained rows: the model with those rows in its matrices, in memory, in files, in PEFT, and in the loss."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from lorafit import (
    Batches,
    LoraConfig,
    TrainConfig,
    add_lora,
    add_tokens,
    count_parameters,
    find_targets,
    load_lora,
    load_model,
    lora_disabled,
    merge_lora,
    save_lora,
    train,
    unload_lora,
)
from lorafit.errors import NumericError, UsageError
from lorafit.lora.inject import wrappers
from lorafit.lora.tokens import KEY, TiedHead, TokenRows, enlarge
from lorafit.training.loop import begin, plan_passes, take_step
from tests.test_peft_parity import assert_same, in_peft, logits

Tiny = Callable[..., Any]
IDS = (5, 90, 17)
# Each family's embedding, and whether its head is tied to it.
KINDS = {
    "llama": ("model.embed_tokens", False),
    "tied llama": ("model.embed_tokens", True),
    "gpt2": ("transformer.wte", True),
    "gemma2": ("model.embed_tokens", True),
    "gemma3_text": ("model.embed_tokens", True),
    "bloom": ("transformer.word_embeddings", True),
    "opt": ("model.decoder.embed_tokens", True),
}
LORA = {"gpt2": ("c_attn",), "bloom": ("query_key_value",)}


def make(tiny: Tiny, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, LoraConfig]:
    tied = {"tie_word_embeddings": True} if kind == "tied llama" else {}
    model = tiny(kind.removeprefix("tied "), **tied).to(dtype)
    return model, LoraConfig(r=2, alpha=4, targets=LORA.get(kind, ("q_proj",)), train_tokens=IDS)


def dense(model: Any) -> Any:
    """The same function without token wrappers: the rows written into copies of the matrices."""
    plain = copy.deepcopy(model)
    for name, layer in list(wrappers(plain)):
        if isinstance(layer, TokenRows | TiedHead):
            W = layer.weight.detach().clone()
            layer.base_layer.weight = nn.Parameter(W)
            plain.set_submodule(name, layer.base_layer)
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_base_bit_for_bit(
    kind: str, dtype: torch.dtype, tiny: Tiny, shaken: Tiny, token_ids: Tiny
) -> None:
    model, config = make(tiny, kind, dtype)
    tokens = token_ids()
    tokens[0, :3] = torch.tensor(IDS)
    raw = logits(model, tokens)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    plan = find_targets(model, config)
    assert add_lora(model, config) == plan
    assert (plan.trainable, plan.total) == (count_parameters(model).trainable, count_parameters(model).total)
    embedding, tied = KINDS[kind]
    assert dict(plan.tokens) == dict.fromkeys([embedding] if tied else [embedding, "lm_head"], IDS)
    assert f"  {embedding}   3 rows trained" in str(plan)
    assert model.get_submodule(embedding).rows.dtype == torch.float32
    assert torch.equal(logits(model, tokens), raw)
    shaken(model)
    assert not torch.equal(logits(model, tokens), raw)
    with lora_disabled(model):
        assert torch.equal(logits(model, tokens), raw)
    unload_lora(model)
    assert torch.equal(logits(model, tokens), raw)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_model_with_those_rows(kind: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny) -> None:
    model, config = make(tiny, kind, torch.float64)
    add_lora(model, config)
    shaken(model)
    tokens = token_ids()
    tokens[0, :3] = torch.tensor(IDS)
    expected = dense(model)
    assert_same(logits(model, tokens), logits(expected, tokens))
    for each in (model, expected):
        each.zero_grad()
        each(tokens, labels=tokens).loss.backward()
    embedding, tied = KINDS[kind]
    grad = expected.get_input_embeddings().weight.grad
    if tied:  # the copies are not tied to each other, so each has its part of the gradient
        grad = grad + expected.get_output_embeddings().weight.grad
    torch.testing.assert_close(model.get_submodule(embedding).rows.grad, grad[list(IDS)])
    if not tied:
        torch.testing.assert_close(model.lm_head.rows.grad, expected.lm_head.weight.grad[list(IDS)])


@pytest.mark.parametrize("kind", KINDS)
def test_merging_writes_the_rows_and_leaves_ties(kind: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny) -> None:
    model, config = make(tiny, kind)
    before = model.get_input_embeddings().weight.detach().clone()
    add_lora(model, config)
    shaken(model)
    adapted = logits(model, token_ids())
    rows = model.get_submodule(KINDS[kind][0]).rows.detach().clone()
    merge_lora(model)
    W = model.get_input_embeddings().weight
    assert type(model.get_input_embeddings()).__name__.endswith("Embedding")
    assert torch.equal(W[list(IDS)], rows)
    others = [i for i in range(96) if i not in IDS]
    assert torch.equal(W[others], before[others])
    assert (model.get_output_embeddings().weight is W) == KINDS[kind][1] == model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model, token_ids()), adapted, rtol=1e-4, atol=1e-5)


def test_merging_rows_that_are_not_finite_is_refused(tiny: Tiny) -> None:
    model, config = make(tiny, "tied llama")
    add_lora(model, config)
    model.model.embed_tokens.rows.data[1, 2] = torch.nan
    with pytest.raises(NumericError, match=r"into model\.embed_tokens; nothing was changed"):
        merge_lora(model)


# --- files ------------------------------------------------------------------------------------------


def from_peft(model: Any, ids: Any, path: Path, shaken: Tiny, **config: Any) -> Any:
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT advises on Conv1D and tied weights
        theirs = shaken(peft.get_peft_model(model, peft.LoraConfig(trainable_token_indices=ids, **config))).eval()
        theirs.save_pretrained(str(path))
    return theirs


@pytest.mark.parametrize("kind", KINDS)
def test_our_file_in_peft_and_here(kind: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path) -> None:
    model, config = make(tiny, kind)
    add_lora(model, config)
    adapted = logits(shaken(model), token_ids())
    save_lora(model, tmp_path)
    assert_same(logits(in_peft(make(tiny, kind)[0], tmp_path), token_ids()), adapted)
    again = make(tiny, kind)[0]
    plan = load_lora(again, tmp_path)
    assert torch.equal(logits(again, token_ids()), adapted)
    assert (plan.trainable, plan.total) == (count_parameters(again).trainable, count_parameters(again).total)
    embedding, tied = KINDS[kind]
    said = json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"]
    assert said == (list(IDS) if tied else {embedding: list(IDS), "lm_head": list(IDS)})
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 10_000  # the embedding alone has 12,288 bytes


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("llama", [5, 90, 17]),
        ("tied llama", [5, 90, 17]),
        ("gpt2", [90]),
        ("gemma3_text", [5, 90]),
        ("llama", {"embed_tokens": [5, 90], "lm_head": [5, 90]}),
        ("tied llama", {"embed_tokens": [5, 90], "lm_head": [5, 90]}),
        ("llama", {"lm_head": [7]}),
    ],
)
def test_pefts_file_here(kind: str, ids: Any, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path) -> None:
    base, config = make(tiny, kind)
    theirs = from_peft(base, ids, tmp_path / "theirs", shaken, target_modules=list(config.targets))
    ours = make(tiny, kind)[0]
    load_lora(ours, tmp_path / "theirs")
    assert_same(logits(ours, token_ids()), logits(theirs, token_ids()))
    save_lora(ours, tmp_path / "ours")
    assert_same(logits(in_peft(make(tiny, kind)[0], tmp_path / "ours"), token_ids()), logits(theirs, token_ids()))


@pytest.fixture
def words() -> Any:
    """A tokenizer of 96 words, w3 to w95 and three that are special."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2", "gemma3_text", "opt"])
def test_new_tokens_from_the_tokenizer_to_the_file_and_back(
    kind: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, words: Any, tmp_path: Path
) -> None:
    model, config = make(tiny, kind)
    model.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    raw = logits(model, token_ids())
    ids = add_tokens(model, words, ["<a>", "<b>", "w7"])
    assert ids == (96, 97, 7)
    assert words("w5<a>w6 <b>")["input_ids"][1] == 96
    assert model.config.vocab_size == len(words) == 98
    assert_same(logits(model, token_ids())[..., :96], raw)
    W = model.get_input_embeddings().weight
    torch.testing.assert_close(W[96:], W[:96].mean(dim=0).expand(2, -1))
    assert (model.get_output_embeddings().weight is W) == KINDS[kind][1]
    add_lora(model, LoraConfig(r=2, targets=config.targets, train_tokens=ids))
    tokens = torch.tensor([[3, 96, 5, 97, 7, 96]])
    adapted = logits(shaken(model), tokens)
    save_lora(model, tmp_path / "adapter", base_model=str(tmp_path / "base"), tokenizer=words)
    save_lora(model, tmp_path / "adapter", tokenizer=words)  # over itself

    again, tokenizer = load_model(tmp_path / "base", adapter=tmp_path / "adapter", dtype="float32", device="cpu")
    assert tokenizer.convert_tokens_to_ids(["<a>", "<b>"]) == [96, 97]
    assert torch.equal(logits(again, tokens), adapted)
    alone = make(tiny, kind)[0]
    plan = load_lora(alone, tmp_path / "adapter")  # it has no tokenizer to ask, and is enlarged all the same
    assert torch.equal(logits(alone, tokens), adapted)
    assert (plan.trainable, plan.total) == (count_parameters(alone).trainable, count_parameters(alone).total)
    wide = make(tiny, kind)[0]
    enlarge(wide, 98)
    assert_same(logits(in_peft(wide, tmp_path / "adapter"), tokens), adapted)

    merge_lora(again).save_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tokens), adapted, rtol=1e-4, atol=1e-5)


def test_an_enlarged_head_with_a_bias(tiny: Tiny) -> None:
    model = tiny("llama")
    model.lm_head = nn.Linear(32, 96)
    raw = model.lm_head(torch.ones(32))
    enlarge(model, 99)
    assert torch.equal(model.lm_head(torch.ones(32))[:96], raw)
    torch.testing.assert_close(model.lm_head.bias[98], model.lm_head.bias[:96].mean())
    assert (model.lm_head.out_features, model.get_input_embeddings().num_embeddings) == (99, 99)
    assert not enlarge(model, 50)


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gemma2"])
def test_the_loss_of_a_step_and_its_gradients(kind: str, tiny: Tiny, shaken: Tiny, examples: Tiny) -> None:
    """As the model itself makes them: all logits, one cross-entropy, and autograd."""
    model, config = make(tiny, kind, torch.float64)
    add_lora(model, config)
    shaken(model)
    rows = [example for example in examples(8) if set(IDS) & set(example.ids)]
    batches = Batches(rows, 4)
    assert any(label in IDS for row in batches.rows(0) for label in row.labels)
    assert plan_passes(model, batches).head is not None
    run = begin(model, batches, TrainConfig(lr=1.0, warmup=0, max_grad_norm=None))
    run.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    expected, before = dense(model), model.get_input_embeddings().rows.detach().clone()
    record = take_step(run)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in batches.rows(0):
        logits, labels = expected(torch.tensor([row.ids])).logits[0, :-1], torch.tensor(row.labels[1:])
        total = total + F.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    assert record["loss"] == pytest.approx(total.item() / count, rel=1e-10)
    grad = expected.get_input_embeddings().weight.grad
    grad = grad + expected.get_output_embeddings().weight.grad if KINDS[kind][1] else grad
    grad = grad[list(IDS)]  # its norm layers compute in fp32, whatever the model is in
    assert (before - model.get_input_embeddings().rows - grad).norm() <= 1e-6 * grad.norm()


def test_training_moves_the_rows_and_nothing_of_the_base(tiny: Tiny, examples: Tiny) -> None:
    model, config = make(tiny, "tied llama")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, config)
    rows = model.model.embed_tokens.rows
    before = rows.detach().clone()
    train(model, Batches(examples(8), 4), TrainConfig(lr=1e-2, steps=3, neftune=1.0, lr_embeddings=1e-1))
    assert ((rows - before).abs().amax(dim=1) > 0.05).all()
    unload_lora(model)
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters())


# --- what is refused --------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_and_changes_nothing(tiny: Tiny, words: Any) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    for config, said in (
        ({"train_tokens": (96,)}, r"model\.embed_tokens has 96 rows, and no 96: add_tokens first"),
        ({"targets": ("embed_tokens",)}, r"model\.embed_tokens is adapted or trained already"),
        ({"train_modules": ("lm_head",)}, "lm_head is adapted or trained already"),
        ({"train_modules": ("model",)}, r"model is adapted or trained already"),
        ({"token_layers": ("embed",)}, r"token_layers 'embed' matches no layer of the model; its layers end in embed"),
        ({"train_tokens": (5, 5)}, "a list of different token ids"),
        ({"train_tokens": (-1,)}, "a list of different token ids"),
        ({"train_tokens": (), "token_layers": ("lm_head",)}, "where train_tokens are, and there are none"),
    ):
        with pytest.raises(UsageError, match=said):
            add_lora(model, LoraConfig(**{"train_tokens": (5,), **config}))
    assert not list(wrappers(model))
    with pytest.raises(UsageError, match="must be of more than blanks: ' '"):
        add_tokens(model, words, ["<a>", " "])
    add_lora(model)
    with pytest.raises(UsageError, match="add the tokens before it is put in"):
        add_tokens(model, words, ["<a>"])


def test_a_copy_of_the_model_has_rows_of_its_own(tiny: Tiny, shaken: Tiny, token_ids: Tiny) -> None:
    model, config = make(tiny, "tied llama")
    add_lora(model, config)
    adapted = logits(shaken(model), token_ids())
    twin = copy.deepcopy(model)
    twin.model.embed_tokens.rows.data.zero_()
    assert twin.lm_head.shared[0] is twin.model.embed_tokens
    assert torch.equal(logits(model, token_ids()), adapted)
    assert [name for name in model.state_dict() if name.endswith(KEY)] == [f"model.embed_tokens.{KEY}"]
