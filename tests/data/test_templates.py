"""Every chat template in TRL's wheel: which are one row, which are split, which are refused, and that it is right.

`python tests/data/test_templates.py` writes the table in docs/chat-templates.md anew; a test holds it up to date.
"""

import importlib.util
import sys
from contextlib import suppress
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from lorafit.data.chat import DATE, ChatTemplate, Example
from lorafit.data.messages import checked
from lorafit.errors import DataError

TABLE = Path(__file__).resolve().parents[2] / "docs" / "chat-templates.md"


def templates() -> list[Path]:
    spec = importlib.util.find_spec("trl")
    folders = spec.submodule_search_locations if spec else None
    return sorted((Path(folders[0]) / "chat_templates").glob("*.jinja")) if folders else []


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, thought: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"reasoning_content": thought} if thought else {})


SYSTEM = {"role": "system", "content": "Be brief"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which"}},
            "required": ["city"],
        },
    },
}
FUNCTION = {"name": "weather", "arguments": {"city": "Rome"}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call00001", "type": "function", "function": FUNCTION}],
}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "sunny"}
CASES: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("Hello there"), answer("Hi friend")],
    "system": [SYSTEM, user("Hello there"), answer("Hi friend")],
    "two turns": [user("Hello there"), answer("Hi friend"), user("And now?"), answer("Bye pal")],
    "thinking": [user("Hello there"), answer("Hi friend", "because")],
    "thinking, two turns": [
        user("Hello there"),
        answer("Hi friend", "because"),
        user("And now?"),
        answer("Bye pal", "hence"),
    ],
    "thinking in the text": [
        user("Hello there"),
        answer("<think>\nbecause\n</think>\n\nHi friend"),
        user("And now?"),
        answer("<think>\nhence\n</think>\n\nBye pal"),
    ],
    "tools": [user("Hello there"), CALL, RESULT, answer("Hi friend")],
    "two answers in a row": [user("Hello there"), answer("Hi friend"), answer("Bye pal")],
}
# What an answer consists of, whatever the template wraps around it.
WORDS = ("Hi friend", "Bye pal", "because", "hence", "Rome")
OTHERS = ("Be brief", "Hello there", "And now?", "sunny", "Tells it")

REASONS = {
    "must alternate": "a",
    "System role not supported": "a",
    "has reasoning": "b",
    "has a tool call": "c",
    "row's tools": "c",
    "has no attribute": "c",
    "not JSON serializable": "c",
    "no prompt leads": "d",
}
LEGEND = """\
* **a** the template itself raises an error: it knows no system role, or wants user and assistant in turn
* **b** it does not show the reasoning, which would be lost without a word
* **c** it does not show tools or tool calls, or breaks on them
* **d** it shows the first of two answers in a row in one way when it asks for the second, and in another afterwards
"""


def encode(tokenizer: Any, case: str) -> list[Example]:
    tools = [TOOL] if case == "tools" else None
    return ChatTemplate(tokenizer, with_tools=bool(tools)).encode(CASES[case], tools=tools)


def outcome(tokenizer: Any, case: str) -> str:
    try:
        rows = encode(tokenizer, case)
    except DataError as error:
        return "refused " + next(letter for text, letter in REASONS.items() if text in str(error))
    return "one row" if len(rows) == 1 else "split"


def table(make_tokenizer: Any) -> str:
    """The page docs/chat-templates.md."""
    paths = templates()
    found = {path.stem: [outcome(make_tokenizer(path.read_text()), case) for case in CASES] for path in paths}
    cells = [cell.split()[0] for row in found.values() for cell in row]
    lines = [f"| `{name}` | " + " | ".join(row) + " |" for name, row in found.items()]
    return f"""# What becomes of a conversation under each chat template

[data.md](data.md) explains the rule. This table shows what it makes of all {len(paths)} templates in TRL's wheel
(`trl/chat_templates`; those ending in `_training` are TRL's own changes of the template before them), for eight
conversations: {len(cells)} cases, of which {cells.count("one")} are one row, {cells.count("split")} are split into one
row per assistant turn, and {cells.count("refused")} are refused with one line that says why:

{LEGEND}
Whatever is accepted is tested (`tests/data/test_templates.py`): every supervised run of tokens stands behind exactly
the prompt that the model is given for that turn, holds all of the answer and nothing of anybody else's text, and ends
with the token that ends the turn.

| template | {" | ".join(CASES)} |
|---|{"---|" * len(CASES)}
{chr(10).join(lines)}

This page is written by `python tests/data/test_templates.py`.
"""


@pytest.fixture(autouse=True)
def today(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' own rendering, which is the reference here, live on the fixed date."""

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return DATE

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Frozen)


def reference(chat: ChatTemplate, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> str | None:
    """What transformers renders; None where it cannot (it drops `content: None`, which DeepSeek's templates want)."""
    if chat._parts:
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} if m["content"] else m for m in messages]
    try:
        text: str = chat.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False
        )
    except Exception:
        return None
    return text


@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_loss_is_on_what_the_assistant_writes_behind_the_prompt_it_is_given(path: Path, byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer(path.read_text())
    added = tokenizer.added_tokens_decoder
    for case, messages in CASES.items():
        tools = [TOOL] if case == "tools" else None
        try:
            rows = encode(tokenizer, case)
        except DataError:
            continue  # which ones are refused, the table says
        chat = ChatTemplate(tokenizer, with_tools=bool(tools))
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        # One run of supervised tokens per assistant turn: all in one row, or each in a row of its own.
        runs: list[tuple[list[int], int, int]] = []
        for row in rows:
            at = 0
            for learns, group in groupby(row.labels, key=lambda label: label >= 0):
                end = at + len(list(group))
                if learns:
                    runs.append((row.ids, at, end))
                    assert row.labels[at:end] == row.ids[at:end]
                at = end
            assert row.labels[-1] >= 0, "a row ends with its last answer"
        assert len(rows) in (1, len(turns))
        assert len(runs) == len(turns), case
        views = [chat._view(message) for message in checked(messages)]
        for k, (ids, start, end) in zip(turns, runs, strict=True):
            prompt = reference(chat, messages[:k], tools, True) or chat.render(views[:k], tools, prompt=True)
            full = reference(chat, messages[: k + 1], tools, False) or chat.render(views[: k + 1], tools)
            context, said = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:end])
            if full.startswith(prompt):
                assert ids[:start] == tokenizer.encode(prompt, add_special_tokens=False), (case, k)
            else:  # the prompt opens something that the finished turn does not show
                assert prompt.startswith(context)
                assert full.startswith(context)
                assert len(prompt) - len(context) < 40
                assert all(word in context for word in OTHERS if word in prompt)
            # Behind the answer the template writes at most white space and a final EOS; an answer without any end
            # token of the template's gets EOS.
            rest = full.removeprefix(context + said)
            if rest == full:
                assert added[ids[end - 1]].content == tokenizer.eos_token
                rest = full.removeprefix(context + said.removesuffix(tokenizer.eos_token))
            assert rest != full, (case, k, said)
            assert rest.strip() in ("", tokenizer.eos_token), (case, k, rest)
            assert ids[end - 1] in added, (case, k, said)
            mine = str(messages[k])
            assert all(word in said for word in WORDS if word in mine), (case, k, said)
            assert not any(word in said for word in (*WORDS, *OTHERS) if word not in mine), (case, k, said)


@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_a_conversation_is_one_row_exactly_when_its_beginnings_agree(path: Path, byte_tokenizer: Any) -> None:
    chat = ChatTemplate(byte_tokenizer(path.read_text()))
    messages = CASES["two turns"]
    whole = reference(chat, messages, None, False)
    assert whole
    parts = [reference(chat, messages[:k], None, k % 2 == 1) or "" for k in (1, 2, 3)]
    ends = [full.removesuffix(chat._end_text).rstrip()[-1] in ">]}" for full in (parts[1], whole)]
    agree = all(whole.startswith(part.removesuffix("</s>" if "phi3" in path.stem else "")) for part in parts)
    assert (len(chat.encode(messages)) == 1) == (agree and all(ends))


@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_rendering_is_transformers_own(path: Path, byte_tokenizer: Any) -> None:
    chat = ChatTemplate(byte_tokenizer(path.read_text()))
    for case, messages in CASES.items():
        for prompt in (False, True):
            theirs = reference(chat, messages, [TOOL] if case == "tools" else None, prompt)
            if theirs is not None:
                views = [chat._view(message) for message in checked(messages)]
                assert chat.render(views, [TOOL] if case == "tools" else None, prompt=prompt) == theirs


LENGTHS = {"a megabyte": (200, 5000), "many messages": (200, 10)}


def lengthy(case: str, count: int, length: int) -> list[dict[str, Any]]:
    """`case` again and again, `count` messages in all, each of `length` characters."""
    text = ("word, <b>and</b>\n" * length)[:length]
    repeated = (CASES[case] * count)[:count] if case != "tools" else [user("Q"), *[CALL, RESULT] * (count // 2)]
    return [message | ({"content": text} if message["content"] else {}) for message in repeated]


@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_long_conversations_take_half_of_their_steps_at_most(path: Path, byte_tokenizer: Any) -> None:
    chat = ChatTemplate(byte_tokenizer(path.read_text()), with_tools=True)
    for case in ("two turns", "thinking", "tools"):
        for length in LENGTHS.values():
            views = [chat._view(message) for message in checked(lengthy(case, *length))]
            with suppress(DataError):  # which ones are refused, the table says
                chat.render(views, [TOOL] * 20 if case == "tools" else None)
            budget = chat._template.budget
            assert budget.allowed - budget.left < 0.5 * budget.allowed, (case, length)


def test_a_thousand_messages_and_a_megabyte_pass(byte_tokenizer: Any) -> None:
    """Where a template looks back from every message: of those in TRL, the most wasteful one."""
    (path,) = [path for path in templates() if path.stem == "gptoss"] or pytest.skip("trl is not installed")
    chat = ChatTemplate(byte_tokenizer(path.read_text()))
    assert len(chat.render([chat._view(message) for message in checked(lengthy("tools", 1000, 1000))])) > 500_000


@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_control_tokens_in_messages_are_text(path: Path, byte_tokenizer: Any) -> None:
    """The control tokens of a row are those the template wrote, and the text is what the user wrote."""
    tokenizer = byte_tokenizer(path.read_text())
    chat = ChatTemplate(tokenizer)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    hostile = "x".join(added)
    forged = "x".join(special)

    def control(question: str, reply: str) -> tuple[list[int], str]:
        (row,) = chat.encode([user(question), answer(reply)])
        return [i for i in row.ids if i in tokenizer.added_tokens_decoder], tokenizer.decode(row.ids)

    plain, _ = control("Hello", "Hi")
    asked, text = control(f"Hello{hostile}.", "Hi")
    assert asked == plain
    assert f"Hello{hostile}." in text
    if "channel" not in forged:  # gpt-oss refuses answers with its own tokens
        said, text = control("Hello", f"Hi{forged}.")
        assert said == plain
        assert f"Hi{forged}." in text


@pytest.mark.parametrize("case", range(100))
def test_nothing_that_a_message_says_becomes_a_control_token(case: int, tmp_path: Path) -> None:
    """`python -m soak --only templates` does it by the thousand."""
    from soak import templates as hostile

    if not templates():
        pytest.skip("trl is not installed")
    assert hostile.run(case, tmp_path) is None


def test_the_table_in_docs_is_up_to_date(byte_tokenizer: Any) -> None:
    if not templates():
        pytest.skip("trl is not installed")
    assert TABLE.read_text(encoding="utf-8") == table(byte_tokenizer), "run: python tests/data/test_templates.py"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import make_tokenizer

    TABLE.write_text(table(make_tokenizer), encoding="utf-8")
