"""Conversations to ids and labels: by hand on small templates, and on the real Qwen tokenizer where it is at hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorafit.data.chat import (
    DATE,
    IGNORE,
    PLAIN,
    ChatTemplate,
    encode_chat,
    encode_continuation,
    encode_text,
)
from lorafit.data.messages import BREAK, checked
from lorafit.errors import DataError, UsageError

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]


def texts(tokenizer: Any, show: Any, messages: Any = TALK, **options: Any) -> list[str]:
    return [show(row, tokenizer) for row in encode_chat(messages, tokenizer, **options)]


# --- which tokens carry loss -----------------------------------------------------------------------------


def test_every_answer_carries_loss_with_its_end_token(byte_tokenizer: Any, show: Any) -> None:
    assert texts(byte_tokenizer(), show) == [
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧"
    ]


def test_loss_on_the_last_answer_or_on_everything(byte_tokenizer: Any, show: Any) -> None:
    tokenizer = byte_tokenizer()
    every, last, everything = (
        encode_chat(TALK, tokenizer, loss_on=choice)[0] for choice in ("assistant", "last", "all")
    )
    assert every.ids == last.ids == everything.ids
    assert show(last, tokenizer).count("⟦") == 1
    assert show(last, tokenizer).endswith("⟦A2<|im_end|>⟧")
    assert everything.labels == everything.ids


def test_what_comes_after_the_last_answer_is_left_out(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer()
    assert encode_chat([*TALK, {"role": "user", "content": "Q3"}], tokenizer) == encode_chat(TALK, tokenizer)


def test_a_greeting_and_an_empty_answer_are_context(byte_tokenizer: Any, show: Any) -> None:
    greeting = [{"role": "assistant", "content": "Welcome"}, *TALK[1:3]]
    (text,) = texts(byte_tokenizer(), show, greeting)
    assert text.startswith("<|im_start|>assistant\nWelcome<|im_end|>\n<|im_start|>user")
    assert text.count("⟦") == 1
    silent = [TALK[1], {"role": "assistant", "content": " "}]
    assert texts(byte_tokenizer(), show, silent) == []
    (text,) = texts(byte_tokenizer(), show, [*silent, *TALK[3:]])
    assert text.count("⟦") == 1
    with pytest.raises(DataError, match="no assistant message answers anything"):
        encode_chat([{"role": "assistant", "content": "Welcome"}, TALK[1]], byte_tokenizer())


FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}[thought]{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_shows_earlier_answers_differently_is_split(byte_tokenizer: Any, show: Any) -> None:
    assert texts(byte_tokenizer(FORGETFUL), show, TALK[1:]) == [
        "<|user|>Q1<|end|><|assistant|>⟦[thought]A1<|end|>⟧",
        "<|user|>Q1<|end|><|assistant|>A1<|end|><|user|>Q2<|end|><|assistant|>⟦[thought]A2<|end|>⟧",
    ]


def test_loss_on_everything_is_one_row_even_there(byte_tokenizer: Any, show: Any) -> None:
    """Rows that share a beginning would count it twice."""
    (text,) = texts(byte_tokenizer(FORGETFUL), show, TALK[1:], loss_on="all")
    assert text == "⟦<|user|>Q1<|end|><|assistant|>A1<|end|><|user|>Q2<|end|><|assistant|>[thought]A2<|end|>⟧"


def test_end_text_is_set_aside_and_never_learned(byte_tokenizer: Any, show: Any) -> None:
    """As Phi-3 does: EOS at the very end, behind the end token of the turn, and only there."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}<|endoftext|>{% endif %}"
    )
    assert texts(byte_tokenizer(template), show, TALK[1:]) == [
        "<|user|>Q1<|end|>\n<|assistant|>⟦A1<|end|>⟧\n<|user|>Q2<|end|>\n<|assistant|>⟦A2<|end|>⟧"
    ]


def test_a_last_end_token_of_its_own_is_learned_and_splits(byte_tokenizer: Any, show: Any) -> None:
    """As gpt-oss does: the answer ends in one token while it is the last, and in another later."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert texts(byte_tokenizer(template), show, TALK[1:]) == [
        "<|user|>Q1<|end|><|assistant|>⟦A1<|return|>⟧",
        "<|user|>Q1<|end|><|assistant|>A1<|end|><|user|>Q2<|end|><|assistant|>⟦A2<|return|>⟧",
    ]


PREFILL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>(ponder){% endif %}"
)


@pytest.mark.parametrize("reply", ["A1", "(po", "(ponder A1"])
def test_a_prompt_that_opens_a_thought_is_no_prefix(byte_tokenizer: Any, show: Any, reply: str) -> None:
    """Loss starts where prompt and answer part, but not later because an answer happens to begin alike."""
    messages = [TALK[1], {"role": "assistant", "content": reply}]
    assert texts(byte_tokenizer(PREFILL), show, messages) == [f"<|user|>Q1<|end|><|assistant|>⟦{reply}<|end|>⟧"]


def test_a_template_whose_prompt_hides_the_conversation_is_refused_by_name(byte_tokenizer: Any) -> None:
    template = (
        "{% if add_generation_prompt %}<|go|>{% endif %}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    )
    tokenizer = byte_tokenizer(template)
    tokenizer.name_or_path = "some/model-7b"
    with pytest.raises(DataError, match="chat template of model-7b shows what comes before message 2") as caught:
        encode_chat(TALK[1:3], tokenizer)
    assert "\n" not in str(caught.value)


def test_a_template_without_end_token_learns_eos_turn_by_turn(byte_tokenizer: Any, show: Any) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert texts(byte_tokenizer(template), show, TALK[1:]) == [
        "user: Q1\nassistant:⟦ A1</s>⟧",
        "user: Q1\nassistant: A1\nuser: Q2\nassistant:⟦ A2</s>⟧",
    ]


def test_plain_template(byte_tokenizer: Any, show: Any) -> None:
    tokenizer = byte_tokenizer(None)
    assert texts(tokenizer, show, template="plain") == [
        "<s>### System:\nS\n\n### User:\nQ1\n\n### Assistant:\n⟦A1</s>⟧\n\n### User:\nQ2\n\n### Assistant:\n⟦A2</s>⟧"
    ]
    # Where BOS and EOS are one token (GPT-2), it stands at the end of answers only.
    assert texts(byte_tokenizer(None, bos="</s>"), show, TALK[1:3], template="plain")[0].startswith("### User")


# --- the template itself ---------------------------------------------------------------------------------


def test_no_template_is_an_error_that_names_the_option(byte_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no chat template: give chat_template a file with one, or 'plain'"):
        encode_chat(TALK, byte_tokenizer(None))
    with pytest.raises(UsageError, match="this tokenizer has none"):
        encode_chat(TALK, byte_tokenizer(None, eos=None), template="plain")


def test_template_from_a_file(byte_tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(PLAIN)
    tokenizer = byte_tokenizer()
    assert encode_chat(TALK, tokenizer, template=str(file)) == encode_chat(TALK, tokenizer, template="plain")
    with pytest.raises(UsageError, match="neither 'plain' nor a file"):
        encode_chat(TALK, tokenizer, template=str(tmp_path / "missing.jinja"))
    file.write_text("{% for %}")
    with pytest.raises(UsageError, match="is not a Jinja template"):
        encode_chat(TALK, tokenizer, template=str(file))


def test_a_template_of_its_own_for_tools(byte_tokenizer: Any, show: Any) -> None:
    tokenizer = byte_tokenizer()
    with_tools = "<|tools|>{{ tools | tojson }}" + tokenizer.chat_template
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": with_tools}
    assert "tools" not in texts(tokenizer, show)[0]
    assert '<|tools|>[{"name": "f"}]' in texts(tokenizer, show, tools=[{"name": "f"}])[0]


def test_the_date_is_fixed(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer("{{ strftime_now('%d %b %Y') }}" + byte_tokenizer().chat_template)
    (row,) = encode_chat(TALK, tokenizer)
    assert tokenizer.decode(row.ids).startswith(DATE.strftime("%d %b %Y"))


def test_the_row_begins_with_the_prompt_of_inference(byte_tokenizer: Any) -> None:
    chat = ChatTemplate(byte_tokenizer())
    (row,) = chat.encode(TALK)
    for k in (2, 4):
        prompt = chat.prompt_ids(TALK[:k])
        assert row.ids[: len(prompt)] == prompt
        assert row.labels[len(prompt) - 1] == IGNORE
        assert row.labels[len(prompt)] >= 0


# --- nothing is lost -------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([TALK[1], TALK[2] | {"reasoning_content": "because"}], "has reasoning, but"),
        ([TALK[1], {"role": "assistant", "content": "A", "tool_calls": [CALL]}], "has a tool call, but"),
    ],
)
def test_a_template_that_drops_something_is_refused(byte_tokenizer: Any, messages: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        encode_chat(messages, byte_tokenizer())


def test_tools_and_roles_that_the_template_drops_are_refused(byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"does not show the row's tools \('f'\)"):
        encode_chat(TALK, byte_tokenizer(), tools=[{"name": "f"}])
    with pytest.raises(DataError, match="a tool must be an object"):
        encode_chat(TALK, byte_tokenizer(), tools=["f"])
    only_users = (
        "{% for m in messages if m.role != 'tool' %}<|x|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|x|>{% endif %}"
    )
    with pytest.raises(DataError, match=r"message 2 \(tool\) has content, but .* leaves it out"):
        encode_chat([TALK[1], {"role": "tool", "content": "42"}, TALK[2]], byte_tokenizer(only_users))


def test_developer_is_the_system_where_a_template_knows_no_developer(byte_tokenizer: Any, show: Any) -> None:
    developer = [{"role": "developer", "content": "S"}, *TALK[1:]]
    assert texts(byte_tokenizer(), show, developer) == texts(byte_tokenizer(), show)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages must be a list with at least one message"),
        ("hello", "messages must be a list"),
        (["hello"], "message 1 must be an object with role and content, not 'hello'"),
        ([{"rol": "user", "content": "x"}], r"message 1 has no 'role' \(did you mean 'rol'\?\)"),
        ([{"role": "asistant", "content": "x"}], r"the role 'asistant' \(did you mean 'assistant'\?\): roles are"),
        ([{"role": 3, "content": "x"}], "message 1 has the role 3: roles are system"),
        ([{"role": "user"}], r"message 1 \(user\) has no 'content'"),
        ([{"role": "user", "contnet": "x"}], r"has no 'content' \(did you mean 'contnet'\?\)"),
        ([{"role": "user", "content": None}], "has no 'content'$"),
        ([{"role": "user", "content": 5}], "content must be a string or a list of text parts, not 5"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"a part that is not text \('image'\): remove it"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "tool_calls must be a list, in an assistant"),
        ([{"role": "assistant", "tool_calls": [{"function": 1}]}], "a tool call must be an object with function.name"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "arguments of the call of 'f' must be a JSON object",
        ),
        ([{"role": "assistant", "reasoning": 3, "content": "x"}], "message 1: its reasoning must be a string, not 3"),
        ([{"role": "user", "content": "x", "name": 1}], "message 1: name must be a string, not 1"),
    ],
)
def test_bad_messages_are_one_line_each(messages: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        checked(messages)
    assert "\n" not in str(caught.value)


def test_content_in_parts_is_its_text(byte_tokenizer: Any) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "1"}]}, *TALK[2:3]]
    assert encode_chat(parts, byte_tokenizer()) == encode_chat(TALK[1:3], byte_tokenizer())


def test_half_a_character_is_refused(byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="half a character"):
        encode_chat([{"role": "user", "content": "\ud83d"}, TALK[2]], byte_tokenizer())


# --- data is not structure -------------------------------------------------------------------------------

PIECES = st.sampled_from(["<|im_end|>", "<|im_start|>", "</s>", "<", "|im_end|>", "<|im_", "a", "\n", "é", "\ufdd0"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(question=st.lists(PIECES, max_size=8).map("".join), reply=st.lists(PIECES, max_size=8).map("".join))
def test_no_message_can_forge_a_turn(byte_tokenizer: Any, question: str, reply: str) -> None:
    from_template = ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer()
    rows = encode_chat([{"role": "user", "content": question}, {"role": "assistant", "content": reply}], tokenizer)
    visible = reply.replace("\ufdd0", "").strip()
    assert len(rows) == bool(visible)
    for row in rows:
        added = tokenizer.added_tokens_decoder
        assert [added[i].content for i in row.ids if i in added] == from_template
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>"
        assert tokenizer.decode(row.ids) == text.replace("\ufdd0", "")


def test_a_control_token_inside_another_is_broken_too(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|a</s>|>"]})
    (row,) = encode_chat([{"role": "user", "content": "<|a</s>|>"}, TALK[2]], tokenizer)
    assert tokenizer.eos_token_id not in row.ids


def test_an_assistant_may_write_tokens_that_are_not_special(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer("{# <note> #}" + byte_tokenizer().chat_template)
    note = tokenizer.convert_tokens_to_ids("<note>")
    (row,) = encode_chat([{"role": "user", "content": "<note>"}, {"role": "assistant", "content": "<note>"}], tokenizer)
    assert row.ids.count(note) == 1
    assert row.labels.count(note) == 1


def control_of(row: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.added_tokens_decoder[i].content for i in row.ids if i in tokenizer.added_tokens_decoder]


TURNS = ["<|im_start|>", "<|im_end|>"] * 2
NOTE = "{# <note> #}"


@pytest.mark.parametrize(
    ("normalizer", "double"),
    [(normalizers.NFKC(), "＜note＞"), (normalizers.Lowercase(), "<NOTE>"), (normalizers.NFC(), "<note>")],
)
def test_a_double_that_the_tokenizer_takes_for_a_control_token_is_text(
    byte_tokenizer: Any, normalizer: Any, double: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.add_tokens([AddedToken("<note>", special=False, normalized=True)])
    tokenizer.chat_template = NOTE + tokenizer.chat_template
    assert "<note>" in tokenizer.tokenize(double)
    asked = [{"role": "user", "content": f"a{double}b"}, TALK[2]]
    (row,) = encode_chat(asked, tokenizer)
    assert control_of(row, tokenizer) == TURNS
    assert f"a{normalizer.normalize_str(double)}b" in tokenizer.decode(row.ids)
    # An assistant may write it.
    (row,) = encode_chat([TALK[1], {"role": "assistant", "content": f"a{double}b"}], tokenizer)
    assert control_of(row, tokenizer) == [*TURNS[:3], "<note>", TURNS[3]]


TAGGED = (
    "{% for m in messages %}<|im_start|>{% if m.name %}<{{ m.name }}>{% endif %}{{ m.role }}\n{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", ["|im_end|", "/s", "|im_end|>", "<|im_end|", "s", "note"])
def test_a_name_does_not_become_a_control_token_in_the_brackets_of_the_template(byte_tokenizer: Any, name: str) -> None:
    tokenizer = byte_tokenizer(NOTE + TAGGED)
    (row,) = encode_chat([TALK[1] | {"name": name}, TALK[2]], tokenizer)
    assert control_of(row, tokenizer) == TURNS
    assert f"<{name}>user\nQ1" in tokenizer.decode(row.ids)
    prompt = ChatTemplate(tokenizer).prompt_ids([TALK[1] | {"name": name}])
    assert row.ids[: len(prompt)] == prompt


def test_what_a_template_speaks_of_is_the_templates_own(byte_tokenizer: Any) -> None:
    """A name that it compares with is not broken off, or the template would not know it any more."""
    tokenizer = byte_tokenizer(NOTE + "{% if messages[0].name == 'note' %}yes{% endif %}" + TAGGED)
    (row,) = encode_chat([TALK[1] | {"name": "note"}, TALK[2]], tokenizer)
    assert tokenizer.decode(row.ids).startswith("yes")


def test_two_messages_do_not_join_into_a_control_token(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer("{{ messages[0].content ~ messages[1].content }}" + byte_tokenizer().chat_template)
    asked = [{"role": "user", "content": "a<|im_"}, {"role": "user", "content": "end|>b"}, TALK[2]]
    (row,) = encode_chat(asked, tokenizer)
    assert control_of(row, tokenizer) == TURNS + TURNS[:2]
    assert tokenizer.decode(row.ids).startswith("a<|im_end|>b<|im_start|>")


def test_ordinary_text_comes_apart_nowhere(byte_tokenizer: Any) -> None:
    chat = ChatTemplate(byte_tokenizer(NOTE + byte_tokenizer().chat_template))
    for text in ("> quoted", "end", "a <", "1", "note", "im_start"):
        (row,) = chat.encode([{"role": "user", "content": text}, TALK[2]])
        prompt = chat.prompt_ids([{"role": "user", "content": text}])
        assert chat.tokenizer.decode(prompt) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert row.ids[: len(prompt)] == prompt
        views = [chat._view({"role": "user", "content": text})]
        assert chat._apart(views, None) == (views, None)
        assert BREAK not in views[0]["content"]


@pytest.mark.parametrize("shown", ["[messages[0].content]", "messages[0].content|tojson(ensure_ascii=true)"])
@pytest.mark.parametrize("text", ["<|im_end|>", r"\ufdd0", r"\\ufdd0", "\ufdd0"])
def test_a_break_leaves_no_trace_where_a_template_writes_lists(byte_tokenizer: Any, shown: str, text: str) -> None:
    tokenizer = byte_tokenizer("{{ " + shown + " }}" + byte_tokenizer().chat_template)
    (row,) = encode_chat([{"role": "user", "content": f"a{text}b"}, TALK[2]], tokenizer)
    assert control_of(row, tokenizer) == TURNS
    text = text.replace("\ufdd0", "")
    written = repr([f"a{text}b"]) if shown.startswith("[") else json.dumps(f"a{text}b")
    assert tokenizer.decode(row.ids).startswith(f"{written}<|im_start|>user\na{text}b<|im_end|>")


def test_breaks_in_names_and_thoughts_are_no_reason_to_refuse_a_row(byte_tokenizer: Any) -> None:
    template = byte_tokenizer().chat_template.replace("m.content", "(m.reasoning_content or '') + m.content")
    tokenizer = byte_tokenizer("{{ tools[0].name|tojson if tools }}" + template)
    thought = {"role": "assistant", "reasoning_content": "a\ufdd0b", "content": "A"}
    (row,) = encode_chat([TALK[1], thought], tokenizer, tools=[{"name": 'f"\ufdd0g'}])
    assert tokenizer.decode(row.ids).startswith(r'"f\"g"<|im_start|>user')
    assert tokenizer.decode(row.ids).endswith("assistant\nabA<|im_end|>")


# --- text without a template, and tokenizers with manners of their own ------------------------------------


def with_bos(tokenizer: Any) -> Any:
    """Let `tokenizer` put BOS in front, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_text_has_loss_everywhere_one_bos_and_eos(byte_tokenizer: Any, show: Any) -> None:
    tokenizer = with_bos(byte_tokenizer())
    for text in ("hello", "<s>hello", "hello</s>", "<s>hello</s>"):
        assert show(encode_text(text, tokenizer), tokenizer) == "⟦<s>hello</s>⟧"
    assert show(encode_text("hello", byte_tokenizer()), tokenizer) == "⟦hello</s>⟧"
    assert show(encode_text("hello", byte_tokenizer(eos=None)), tokenizer) == "⟦hello⟧"


def test_a_continuation_learns_the_completion_and_eos(byte_tokenizer: Any, show: Any) -> None:
    tokenizer = with_bos(byte_tokenizer(None))
    assert show(encode_continuation("Q:", " A", tokenizer, "assistant"), tokenizer) == "<s>Q:⟦ A</s>⟧"
    assert show(encode_continuation("Q:", " A", tokenizer, "all"), tokenizer) == "⟦<s>Q: A</s>⟧"


def test_one_bos_where_template_and_tokenizer_both_write_it(byte_tokenizer: Any) -> None:
    tokenizer = with_bos(byte_tokenizer("{{ bos_token }}" + byte_tokenizer().chat_template))
    (row,) = encode_chat(TALK, tokenizer)
    assert row.ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_pieces_get_no_space_that_the_text_has_not(scheme: str, byte_tokenizer: Any) -> None:
    """Sentencepiece puts a space before whatever it is given; the row equals the whole text tokenised at once."""
    letters = ["▁", "\n", *map(chr, range(33, 127))]
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = byte_tokenizer().chat_template
    (row,) = encode_chat(TALK, tokenizer)
    text = tokenizer.apply_chat_template(TALK, tokenize=False).rstrip()
    assert row.ids == tokenizer.encode(text, add_special_tokens=False)


# --- real tokenizers -------------------------------------------------------------------------------------


def test_the_record_of_a_public_run(shared: Callable[[str], Path]) -> None:
    folder = shared("tokenizers/qwen1_5")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    record = json.loads((folder / "golden_bioinstruct_record.json").read_text())
    question = f"{record['instruction']}\n{record['input']}"
    (row,) = encode_chat(
        [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}], tokenizer
    )
    answer = record["answer_ids"] + record["end_ids"]
    assert row.ids == record["prompt_ids"] + answer
    assert row.labels == [IGNORE] * len(record["prompt_ids"]) + answer


def test_real_conversations_read_as_transformers_writes_them(shared: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared("tokenizers/qwen1_5"))
    lines = (shared("data/chat") / "multiturn_messages.jsonl").read_text().splitlines()[:40]
    for messages in (json.loads(line)["messages"] for line in lines):
        (row,) = encode_chat(messages, tokenizer)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert whole.startswith(tokenizer.decode(row.ids))
        learned = tokenizer.decode([label for label in row.labels if label >= 0])
        assert learned == "".join(f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant")
