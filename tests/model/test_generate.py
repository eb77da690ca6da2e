"""Generation equals transformers' own, batches equal single rows, and text is never taken back."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorafit.data.chat import ChatTemplate
from lorafit.errors import ModelError, UsageError
from lorafit.model.generate import _chooser, _Text, generate, next_ids, prompt_ids, stop_tokens, stream

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Hello, world. 你好，世界！",
    "naïve café — 👩‍👩‍👧 🏳️‍🌈",
    "  two  spaces\n\tand a tab",
    "日本語 العربية हिन्दी",
]


def byte_level(chat_template: str | None = CHATML, merges: int = 40) -> PreTrainedTokenizerFast:
    """A byte-level BPE as in GPT-2: characters outside ASCII are split over several tokens."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL) + merges,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(["the quick brown fox", "hello world, the world", "你好你好"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[0], chat_template=chat_template, model_max_length=4096
    )


def sentencepiece() -> PreTrainedTokenizerFast:
    """A BPE with byte fallback as in Llama 2: `▁` is a space, the first one is dropped, <0x..> are bytes."""
    words = ["▁", "▁the", "▁world", "hello", "▁hello", ",", "a", "b", "▁a", "你", "好", "t", "h", "e"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {word: len(vocab) + i for i, word in enumerate(words)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BPE, SPM = byte_level(), sentencepiece()
V = len(BPE)
Build = Callable[..., Any]


@pytest.fixture(scope="session")
def build(tiny: Build) -> Build:
    """A tiny random model that never meets an end token of its own and does not repeat its last one for ever."""

    def make(family: str = "llama", **changes: Any) -> Any:
        model = tiny(family, **{"vocab_size": V, "eos_token_id": None, "tie_word_embeddings": False} | changes)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 2:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 2 * weight.shape[-1] ** -0.5)
        return model

    return make


def rows(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """The ids of each row, its pauses left out."""
    steps = list(next_ids(model, prompts, **options))
    return [[step[i] for step in steps if step[i] is not None] for i in range(len(prompts))]


def random_prompts(*lengths: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, V) for _ in range(n)] for n in lengths]


# --- ids -----------------------------------------------------------------------------------------------


def test_greedy_ids_are_those_of_transformers_generate(build: Build, family: str) -> None:
    same_as_transformers(build(family))


@pytest.mark.parametrize(("family", "changes"), [("falcon", {"alibi": True}), ("mamba", {"state_size": 4})])
def test_greedy_ids_with_alibi_and_without_cache(build: Build, family: str, changes: dict[str, Any]) -> None:
    same_as_transformers(build(family, **changes))


def same_as_transformers(model: Any) -> None:
    said: set[int] = set()
    for prompt in random_prompts(1, 3, 11):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert rows(model, [prompt], max_new_tokens=20) == [expected]
        said.update(expected)
    assert len(said) > 10, "texts of one repeated token would prove nothing"


def test_a_batch_of_uneven_rows_says_what_each_row_says_alone(build: Build, family: str) -> None:
    model = build(family)
    prompts = random_prompts(2, 9, 5, 17)
    assert rows(model, prompts, max_new_tokens=16) == [rows(model, [p], max_new_tokens=16)[0] for p in prompts]


def test_the_cache_is_used_and_each_token_fed_once(build: Build) -> None:
    model, fed = build("llama"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rows(model, random_prompts(7), max_new_tokens=5)
    assert fed == [7, 1, 1, 1, 1]


def test_a_row_ends_at_a_stop_id_while_the_others_go_on(build: Build) -> None:
    model, prompts = build("llama"), random_prompts(4, 8)
    free = rows(model, prompts, max_new_tokens=12)
    end = next(i for i, token in enumerate(free[0]) if i > 2 and token not in free[0][:i] + free[1])
    assert rows(model, prompts, max_new_tokens=12, stop=[free[0][end]]) == [free[0][:end], free[1]]


def test_rows_stop_at_the_end_of_the_models_context(build: Build) -> None:
    model = build("gpt2")
    model.config.n_positions = 20
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:20].clone())
    prompts = random_prompts(18, 5, 12)
    said = rows(model, prompts, max_new_tokens=10)
    assert [len(row) for row in said] == [2, 10, 8]
    assert said == [rows(model, [p], max_new_tokens=10)[0] for p in prompts]
    with pytest.raises(ModelError, match=r"20 tokens, but the model's context holds 20, .*shorten"):
        rows(model, random_prompts(20))


# --- modes and gradients -------------------------------------------------------------------------------


def test_every_module_keeps_its_mode_and_dropout_is_off(build: Build) -> None:
    model = build("gpt2").train()
    model.transformer.drop.p = 0.9  # the tiny models have none of their own
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    prompt = random_prompts(5)
    pieces = next_ids(model, prompt, max_new_tokens=8)
    next(pieces)
    assert [module.training for module in model.modules()] == modes, "between two tokens the model is the caller's"
    assert torch.is_grad_enabled()
    once = rows(model, prompt, max_new_tokens=8)
    assert [module.training for module in model.modules()] == modes
    assert once == rows(model.eval(), prompt, max_new_tokens=8)


def test_a_model_that_fails_half_way_gets_its_mode_back(build: Build) -> None:
    model = build("llama").train()
    model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        rows(model, random_prompts(3))
    assert all(module.training for module in model.modules())


def test_training_works_after_generating(build: Build) -> None:
    model = build("llama")
    rows(model, random_prompts(5), max_new_tokens=3)
    model(input_ids=torch.tensor(random_prompts(6)), use_cache=False).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


# --- text ----------------------------------------------------------------------------------------------


def pieces_of(tokenizer: Any, ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    text = _Text(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            return pieces
    return [*pieces, text.close()]


def plain(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(deadline=None)
@given(st.lists(st.integers(0, V - 1), max_size=40))
def test_pieces_join_to_the_decoded_text_byte_level(ids: list[int]) -> None:
    assert "".join(pieces_of(BPE, ids)) == plain(BPE, ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, len(SPM) - 1), max_size=40))
def test_pieces_join_to_the_decoded_text_sentencepiece(ids: list[int]) -> None:
    assert "".join(pieces_of(SPM, ids)) == plain(SPM, ids)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_a_character_comes_whole_or_not_at_all(text: str) -> None:
    for tokenizer in (BPE, SPM):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if plain(tokenizer, ids).count("\ufffd") == text.count("\ufffd"):
            assert all(piece.count("\ufffd") <= text.count("\ufffd") for piece in pieces_of(tokenizer, ids))


@pytest.mark.parametrize("text", TEXTS)
def test_text_streams_and_is_not_saved_up(text: str) -> None:
    ids = BPE(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(BPE, ids)
    assert "".join(pieces) == text
    assert pieces[-1] == "", "nothing is left for the end"
    whole = [not plain(BPE, ids[: end + 1]).endswith("\ufffd") for end in range(len(ids))]
    assert [bool(piece) for piece in pieces[:-1]] == whole, "each token that completes a character is heard at once"


def test_spaces_between_sentencepiece_words_survive() -> None:
    ids = SPM.convert_tokens_to_ids(["▁hello", "▁the", "▁", "▁world", ",", "▁a", "b"])
    assert pieces_of(SPM, ids) == ["hello", " the", " ", " world", ",", " a", "b", ""]


def test_special_tokens_leave_no_text() -> None:
    ids = [BPE.convert_tokens_to_ids(SPECIAL[1]), *BPE("hello", add_special_tokens=False)["input_ids"]]
    assert "".join(pieces_of(BPE, ids)) == "hello"


@settings(deadline=None)
@given(st.text("ab你", max_size=12), st.lists(st.text("ab你", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    ids = BPE(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(BPE, ids, tuple(stops))
    # A stop string counts as soon as it is complete; of several complete ones the first to begin counts.
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            assert "".join(pieces) == text[: min(found)]
            return
    assert "".join(pieces) == text


# --- prompts and ends ----------------------------------------------------------------------------------


def test_a_string_is_one_user_turn() -> None:
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert BPE.decode(prompt_ids(BPE, "hello")) == rendered
    assert prompt_ids(BPE, "hello") == prompt_ids(BPE, [{"role": "user", "content": "hello"}])


def test_without_a_template_a_string_is_continued_and_a_conversation_refused() -> None:
    bare = byte_level(chat_template=None)
    assert BPE.decode(prompt_ids(bare, "hello")) == "hello"
    with pytest.raises(UsageError, match="no chat template"):
        prompt_ids(bare, [{"role": "user", "content": "hello"}])
    with pytest.raises(UsageError, match="prompt is empty"):
        prompt_ids(bare, "")


@pytest.mark.parametrize("template", [None, "plain"])
def test_a_prompt_is_what_the_training_row_begins_with(build: Build, template: str | None) -> None:
    chat, asked = ChatTemplate(BPE, template), [{"role": "user", "content": "hello"}]
    row = chat.encode([*asked, {"role": "assistant", "content": "world"}])[0]
    prompt = prompt_ids(BPE, "hello", chat)
    assert row.ids[: len(prompt)] == prompt
    assert row.labels[len(prompt) - 1] < 0 <= row.labels[len(prompt)]
    model = build("llama")
    assert row.ids[-1] in stop_tokens(model, BPE, chat=chat)[0]
    said = "".join(stream(model, BPE, "hello", max_new_tokens=8, chat_template=template))
    assert [said] == generate(model, BPE, ["hello"], max_new_tokens=8, chat_template=template)
    ends = stop_tokens(model, BPE, chat=chat)[0]
    assert said == plain(BPE, rows(model, [prompt], max_new_tokens=8, stop=ends)[0])


def test_an_answer_ends_where_tokenizer_model_template_or_caller_say(build: Build) -> None:
    model = build("llama")
    end_of_text, start, end_of_turn = BPE.convert_tokens_to_ids(SPECIAL)
    assert stop_tokens(model, BPE, chat=ChatTemplate(BPE)) == ({end_of_text, end_of_turn}, ())
    assert stop_tokens(model, byte_level(None)) == ({end_of_text}, ())
    model.generation_config.eos_token_id = [70, 71]
    assert stop_tokens(model, byte_level(None), stop="\n\n") == ({end_of_text, 70, 71}, ("\n\n",))
    model.generation_config.eos_token_id = 70
    ids, strings = stop_tokens(model, byte_level(None), stop=[SPECIAL[1], 9, "x"])
    assert (ids, strings) == ({end_of_text, 70, start, 9}, ("x",))


def test_a_template_without_end_token_adds_none(build: Build) -> None:
    plain_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = byte_level(plain_template)
    assert stop_tokens(build("llama"), tokenizer, chat=ChatTemplate(tokenizer))[0] == {tokenizer.eos_token_id}


# --- stream and generate -------------------------------------------------------------------------------


def test_stream_says_what_transformers_generate_says(build: Build) -> None:
    model = build("llama")
    ids = torch.tensor([prompt_ids(BPE, "hello")])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
    said = expected[0, ids.shape[1] :].tolist()
    ends = stop_tokens(model, BPE, chat=ChatTemplate(BPE))[0]
    said = said[: next((i for i, token in enumerate(said) if token in ends), None)]
    assert "".join(stream(model, BPE, "hello", max_new_tokens=40)) == plain(BPE, said)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 5}, {"stop": ["e", "f"]}], ids=str)
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_generate_is_stream_for_many(build: Build, family: str, options: dict[str, Any]) -> None:
    model = build(family)
    talks = ["hello", "the quick brown fox", [{"role": "user", "content": "world"}], "你", "a"]
    answers = generate(model, BPE, talks, batch_size=2, max_new_tokens=12, **options)
    seeds = [options["seed"] + i if "seed" in options else None for i in range(len(talks))]
    assert answers == [
        "".join(stream(model, BPE, talk, max_new_tokens=12, **options | {"seed": seed}))
        for talk, seed in zip(talks, seeds, strict=True)
    ]
    assert answers == generate(model, BPE, talks, batch_size=5, max_new_tokens=12, **options)
    assert len(set(answers)) > 2


def test_a_stop_string_ends_its_row_and_not_its_neighbours(build: Build) -> None:
    model, talks = build("llama"), ["hello", "the quick brown fox", "world", "a"]
    free = generate(model, BPE, talks, max_new_tokens=12)
    stop = free[0][2]
    assert any(stop not in answer for answer in free), "some row must go on"
    assert generate(model, BPE, talks, max_new_tokens=12, stop=stop) == [a.partition(stop)[0] for a in free]


def test_a_model_without_cache_is_given_one_row_at_a_time(build: Build) -> None:
    model, rows_fed = build("mamba"), set()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows_fed.add(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    generate(model, BPE, ["hello", "world", "a"], max_new_tokens=3)
    assert rows_fed == {1}


def test_the_seed_repeats_and_the_lack_of_one_varies(build: Build) -> None:
    model = build("llama")

    def say(seed: int | None) -> str:
        return "".join(stream(model, BPE, "hello", max_new_tokens=20, temperature=1.5, seed=seed))

    assert say(1) == say(1) != say(2)
    assert say(None) != say(None)
    torch.manual_seed(3)
    first = say(None)
    torch.manual_seed(3)
    assert say(None) == first


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.7, 0.6, 0), (1.3, 1.0, 3), (1.0, 0.5, 4), (2.0, 1e-9, 0)],
)
def test_draws_follow_the_distribution_of_transformers_warpers(temperature: float, top_p: float, top_k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    warped = (logits / temperature)[None]
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    expected = transformers.TopPLogitsWarper(top_p)(None, warped)[0].softmax(-1)
    draw, n = _chooser(temperature, top_p, top_k, seed=0), 4000
    counts = torch.bincount(torch.tensor([draw(logits) for _ in range(n)]), minlength=12)
    assert (counts[expected == 0] == 0).all()
    # Within five standard deviations of the binomial, everywhere.
    assert ((counts - n * expected).abs() <= 5 * (n * expected * (1 - expected)).sqrt() + 1e-3).all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
    ids=str,
)
def test_senseless_settings_are_refused_by_name(build: Build, options: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError, match=name):
        list(stream(build("llama"), BPE, "hello", **options))


def test_generate_refuses_a_single_string_and_an_empty_batch_size(build: Build) -> None:
    model = build("llama")
    with pytest.raises(UsageError, match="list of conversations"):
        generate(model, BPE, "hello")
    with pytest.raises(UsageError, match="batch_size"):
        generate(model, BPE, ["hello"], batch_size=0)
    assert generate(model, BPE, []) == []
