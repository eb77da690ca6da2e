"""Text from a model: `stream` yields it piece by piece, `generate` answers a batch.

Both sit on one loop, `next_ids`. Three things are easy to get wrong and stand here in full: the KV cache (a
token is fed once, not with its whole prefix); left padding (rows of a batch must *end* together, so padding
goes in front, is masked, and takes up no position); and final text: a token is not a character, so a piece is
handed out only when no later token can change it.

A model that returns no KV cache (Mamba, RWKV) is fed the whole prefix for every token: slow, but right.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.data.chat import ChatTemplate, encode_text
from lorafit.errors import ModelError, UsageError
from lorafit.training.modes import evaluating

Conversation = str | Sequence[Mapping[str, Any]]
"""One user turn, or a list of messages `{"role": ..., "content": ...}`."""

Stop = str | Sequence[str | int]
"""Where an answer ends, beside the model's own end tokens: strings, token ids, or names of special tokens."""


def stream(
    model: nn.Module,
    tokenizer: Any,
    messages: Conversation,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Stop = (),
    seed: int | None = None,
    chat_template: str | None = None,
) -> Iterator[str]:
    """The answer to `messages`, in pieces; joined, they are the decoded answer without its end token.

    Temperature 0 is greedy; above it a token is drawn from the `top_k` likeliest (0: all) that together hold
    `top_p` of the probability. With `seed` the draw repeats itself. `chat_template` as in `read_examples`.
    """
    choose = [_chooser(temperature, top_p, top_k, seed)]
    chat = _chat(tokenizer, chat_template)
    end_ids, end_strings = stop_tokens(model, tokenizer, stop, chat)
    text = _Text(tokenizer, end_strings)
    prompt = prompt_ids(tokenizer, messages, chat)
    for (token,) in next_ids(model, [prompt], choose, max_new_tokens=max_new_tokens, stop=end_ids):
        if token is not None and (piece := text.push(token)):
            yield piece
        if text.stopped:
            return
    if piece := text.close():
        yield piece


def generate(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Stop = (),
    seed: int | None = None,
    chat_template: str | None = None,
    batch_size: int = 8,
) -> list[str]:
    """The answers to all `conversations`, in their order; number i is what `stream` gives with seed + i."""
    if batch_size < 1:
        raise UsageError(f"batch_size must be greater than 0, not {batch_size}")
    if isinstance(conversations, str):
        raise UsageError("generate takes a list of conversations; for a single one write [conversation]")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        batch_size = 1  # recurrent models need not know what a padding mask is
    chat = _chat(tokenizer, chat_template)
    end_ids, end_strings = stop_tokens(model, tokenizer, stop, chat)
    prompts = [prompt_ids(tokenizer, conversation, chat) for conversation in conversations]
    texts = [_Text(tokenizer, end_strings) for _ in prompts]
    choose = [_chooser(temperature, top_p, top_k, None if seed is None else seed + i) for i in range(len(prompts))]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # least padding
    answers = [""] * len(prompts)
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        batch, draws = [prompts[i] for i in rows], [choose[i] for i in rows]
        for tokens in next_ids(model, batch, draws, max_new_tokens=max_new_tokens, stop=end_ids):
            for i, token in zip(rows, tokens, strict=True):
                if token is not None and not texts[i].stopped:
                    answers[i] += texts[i].push(token)
            if all(texts[i].stopped for i in rows):
                break
        for i in rows:
            answers[i] += texts[i].close()
    return answers


def next_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choose: Sequence[Callable[[Tensor], int]] | None = None,
    *,
    max_new_tokens: int = 256,
    stop: Iterable[int] = (),
) -> Iterator[list[int | None]]:
    """For every step the next token id of each prompt; None for a row that has met a `stop` id or its limit.

    `choose` holds one function per row that picks an id from logits (V,); without it the choice is greedy.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be greater than 0, not {max_new_tokens}")
    choose = choose or [_greedy] * len(prompts)
    end = frozenset(stop)
    accepts = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    left = [min(max_new_tokens, room) for room in _rooms(model, prompts)]  # tokens each row may still say
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    new, cache = ids, None
    while True:
        inputs = {
            "input_ids": new,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :],
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        # no_grad, not inference_mode: a buffer that a rotary embedding renews here must serve training later.
        # Neither context may span the yield below: it would leak into the caller.
        with evaluating(model), torch.no_grad():
            output = model(**{name: value for name, value in inputs.items() if name in accepts})
        cache = getattr(output, "past_key_values", None)
        logits = output.logits[:, -1].float().cpu()  # (rows, V)
        tokens = [choose[row](logits[row]) if left[row] else None for row in range(len(prompts))]
        tokens = [None if token in end else token for token in tokens]
        left = [n - 1 if token is not None else 0 for n, token in zip(left, tokens, strict=True)]
        if any(token is not None for token in tokens):
            yield tokens
        if not any(left):
            return
        # A finished row goes on with a masked token: it is seen by nobody and takes up no position.
        spoken = torch.tensor([[token or 0] for token in tokens], device=device)
        ids = torch.cat([ids, spoken], dim=1)
        mask = torch.cat([mask, torch.tensor([[int(t is not None)] for t in tokens], device=device)], dim=1)
        new = spoken if cache is not None else ids


def prompt_ids(tokenizer: Any, messages: Conversation, chat: ChatTemplate | None = None) -> list[int]:
    """The ids that a model is to continue, as in training. Without a chat template, a string is continued."""
    if isinstance(messages, str) and chat is None and not tokenizer.chat_template:
        ids = encode_text(messages, tokenizer).ids
        ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    else:
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        ids = (chat or ChatTemplate(tokenizer)).prompt_ids(turns)
    if not ids:
        raise UsageError("the prompt is empty: a model continues at least one token")
    return ids


def stop_tokens(
    model: nn.Module, tokenizer: Any, stop: Stop = (), chat: ChatTemplate | None = None
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Ids and strings that end an answer: the tokenizer's, the model's, the template's and the caller's."""
    ids = {tokenizer.eos_token_id}
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids.update(of_model if isinstance(of_model, list | tuple) else [of_model])
    if chat is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        last = chat.encode(turns)[0].ids[-1]  # what training puts at the end of an answer
        ids |= {last} & tokenizer.added_tokens_decoder.keys()
    strings = []
    added = tokenizer.get_added_vocab()
    for entry in (stop,) if isinstance(stop, str) else stop:
        if isinstance(entry, int):
            ids.add(entry)
        elif entry in added:  # a special token leaves no text behind, so it is matched by its id
            ids.add(added[entry])
        elif entry:
            strings.append(entry)
    return frozenset(ids - {None}), tuple(strings)


def _chat(tokenizer: Any, chat_template: str | None) -> ChatTemplate | None:
    return ChatTemplate(tokenizer, chat_template) if chat_template or tokenizer.chat_template else None


class _Text:
    """The text of one row, handed out as soon as it is final.

    Decoding the newest ids alone would lose the space that a sentencepiece decoder drops at the start of a
    text, and decoding all of them for every token is quadratic. So the ids since the last-but-one piece are
    decoded, and what is new in that is the next piece. Nothing is handed out while it can still change: while
    it ends within a character, or may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.silent = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids: list[int] = []
        self.before = self.done = 0  # ids[:done] are decoded; ids[before:done] give the next ones their context
        self.held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that has become final with this token."""
        if token in self.silent:
            return ""
        self.ids.append(token)
        # A run of byte tokens (sentencepiece's byte fallback) becomes text as a whole or not at all: wait.
        if re.fullmatch(r"<0x[0-9A-F]{2}>", self.tokenizer.convert_ids_to_tokens(token) or ""):
            return ""
        piece = self._undecoded()
        return "" if not piece or piece.endswith("\ufffd") else self._release(piece)

    def close(self) -> str:
        """What is left when no token follows."""
        if self.stopped:
            return ""
        rest = self._release(self._undecoded())
        return rest if self.stopped else rest + self.held

    def _undecoded(self) -> str:
        known = self._decode(self.ids[self.before : self.done])
        return self._decode(self.ids[self.before :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def _release(self, piece: str) -> str:
        self.before, self.done = self.done, len(self.ids)
        text = self.held + piece
        found = [at for stop in self.stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stop_strings), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))


def _greedy(logits: Tensor) -> int:
    return int(logits.argmax())


def _chooser(temperature: float, top_p: float, top_k: int, seed: int | None) -> Callable[[Tensor], int]:
    """Logits (V,) -> id. Every row has a generator of its own: its text does not depend on its neighbours."""
    if temperature < 0 or top_k < 0:
        raise UsageError(f"temperature and top_k must not be negative, not {temperature} and {top_k}")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p must be above 0 and at most 1, not {top_p}")
    if temperature == 0:
        return _greedy
    # Without a seed, torch's own generator supplies one: torch.manual_seed then repeats a whole program.
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)

    def draw(logits: Tensor) -> int:
        scores, order = (logits.double() / temperature).sort(descending=True, stable=True)
        scores = scores[: top_k or None]
        probabilities = scores.softmax(-1)
        # A token stays if the likelier ones together have not reached top_p: the likeliest always does.
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
        return int(order[probabilities.multinomial(1, generator=generator)])

    return draw


def _rooms(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens fit behind each prompt; a prompt that leaves no room is refused."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    context = next((n for n in lengths if n), 2**31)
    for prompt in prompts:
        if len(prompt) >= context:
            raise ModelError(
                f"the prompt has {len(prompt)} tokens, but the model's context holds {context}, the answer "
                "included: shorten the conversation"
            )
    return [context - len(prompt) for prompt in prompts]
