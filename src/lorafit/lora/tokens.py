"""Learned tokens: rows of the embedding and of the output head, trained while all others stay as they are.

    embedding   y = R[i] where the token is ids[i], else E[token]        E (vocab, dim) frozen, R (n, dim) trained
    head        z = W h, and + (R − R0) h for the n words that have rows of their own; R0 are W's rows

A head that is tied to the embedding follows it: both read one R. R starts as the rows there are, in fp32, so that the
model's function is the base's, bit for bit. PEFT calls this `trainable_token_indices`, and its name for R is ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafit.config import LoraConfig
from lorafit.errors import UsageError, listing
from lorafit.lora.inits import factor_dtype
from lorafit.lora.names import matches, no_match

ROWS = "trainable_tokens_delta"
KEY = f"token_adapter.{ROWS}"
"""The name of R below its layer's own, in memory and in PEFT's files."""


class TokenRows(nn.Module):
    """An embedding, or an untied output head, of which the rows `ids` are trained.

    The base layer is held and not written to; only `write_merged` does that, in place, so that a tied layer follows.
    """

    ids: Tensor
    place: Tensor

    def __init__(self, base_layer: nn.Module, ids: Sequence[int]) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.enabled = True
        W = _matrix(base_layer)
        place = torch.full((len(W),), -1, device=W.device)
        place[list(ids)] = torch.arange(len(ids), device=W.device)
        self.register_buffer("ids", torch.tensor(list(ids), device=W.device), persistent=False)
        self.register_buffer("place", place, persistent=False)
        rows = W.detach()[self.ids].to(factor_dtype(W))
        self.token_adapter = nn.ParameterDict({ROWS: nn.Parameter(rows)})

    @property
    def rows(self) -> Tensor:
        """R (n, dim)."""
        rows: Tensor = self.token_adapter[ROWS]
        return rows

    @property
    def weight(self) -> Tensor:
        """The whole matrix (vocab, dim), with the trained rows in their places."""
        W = _matrix(self.base_layer)
        return W.index_copy(0, self.ids, self.rows.to(W.dtype)) if self.enabled else W

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """(…) token ids -> (…, dim), or as a head (…, dim) -> (…, vocab)"""
        y: Tensor = self.base_layer(x)
        if not self.enabled:
            return y
        if not isinstance(self.base_layer, nn.Embedding):
            return replaced_logits(y, x, self)
        place = self.place[x]
        # Gemma multiplies what it looks up by a constant.
        gain = getattr(self.base_layer, "embed_scale", 1.0)
        own = F.embedding(place.clamp_min(0), self.rows).to(y.dtype)
        own = own * (gain.to(y.dtype) if isinstance(gain, Tensor) else gain)
        return torch.where((place >= 0).unsqueeze(-1), own, y)

    def saved(self) -> dict[str, Tensor]:
        """R by its name in a file."""
        return {KEY: self.rows}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the rows that were `saved`."""
        self.rows.copy_(tensors[KEY])

    @torch.no_grad()
    def write_merged(self) -> nn.Module:
        """Make the trained rows the base layer's own; returns it."""
        W = _matrix(self.base_layer)
        W[self.ids] = self.rows.to(W.dtype)
        return self.base_layer


class TiedHead(nn.Module):
    """The output head whose matrix is that of the embedding: its words are those of `tokens`."""

    def __init__(self, base_layer: nn.Module, tokens: TokenRows) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        self.shared = (tokens,)  # in a tuple, since R is the embedding's parameter and not one more

    @property
    def weight(self) -> Tensor:
        return self.shared[0].weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, dim) -> (…, vocab)"""
        logits: Tensor = self.base_layer(hidden)
        return replaced_logits(logits, hidden, self.shared[0]) if self.enabled else logits

    def saved(self) -> dict[str, Tensor]:
        """Nothing of its own."""
        return {}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to take."""

    def write_merged(self) -> nn.Module:
        """The base layer: it is merged where the embedding is, being tied."""
        return self.base_layer


def replaced_logits(logits: Tensor, hidden: Tensor, tokens: TokenRows) -> Tensor:
    """`logits` (…, vocab) of the frozen matrix, with those of the trained rows in the place of their own.

    By the difference of the rows, taken in fp32: it is 0 at the start, and so is what is added.
    """
    change = tokens.rows - _matrix(tokens.base_layer)[tokens.ids].to(tokens.rows.dtype)
    return logits.index_add(-1, tokens.ids, F.linear(hidden, change.to(hidden.dtype)))


def _matrix(layer: nn.Module) -> Tensor:
    """(vocab, dim), as both an embedding and a head store it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


# --- planning -------------------------------------------------------------------------------------


def find_rows(
    model: nn.Module, modules: Mapping[str, nn.Module], taken: Iterable[str], config: LoraConfig, strict: bool
) -> dict[str, tuple[int, ...]]:
    """Which rows of which layers `config` trains: of the embedding, and of the head if it is not tied to it.

    `taken` are the modules that are adapted otherwise. UsageError where they overlap, or there is no such row.
    """
    if not config.train_tokens:
        return {}
    embedding, head = base_embedding(model), base_head(model)
    known = [layer for layer in (embedding, None if tied(model) else head) if layer is not None]
    if embedding is None:
        raise UsageError(f"train_tokens: {type(model).__name__} does not say where its embedding is")
    for layer in known:
        _refuse_slices(layer)
    names = [next(name for name, module in modules.items() if module is layer) for layer in known]
    idle = [entry for entry in config.token_layers if not any(matches((entry,), name) for name in names)]
    if idle and (strict or len(idle) == len(config.token_layers)):
        raise UsageError(no_match("token_layers", idle, names))
    chosen = [name for name in names if not config.token_layers or matches(config.token_layers, name)]
    for name in chosen:
        size, largest = len(_matrix(modules[name])), max(config.train_tokens)
        if largest >= (size if strict else 2 * size):  # a file may bring new ones, for which the model is enlarged
            raise UsageError(f"train_tokens: {name} has {size:,} rows, and no {largest}: add_tokens first")
    followers = [name for name, module in modules.items() if tied(model) and module is head]
    inside = tuple(f"{name}." for name in (*chosen, *followers))
    if clash := [name for name in taken if any(path.startswith(f"{name}.") for path in inside)]:
        raise UsageError(f"train_tokens: {listing(clash)} is adapted or trained already: take one or the other")
    return dict.fromkeys(chosen, config.train_tokens)


def wrap_rows(model: nn.Module, rows: Mapping[str, tuple[int, ...]]) -> dict[str, TokenRows | TiedHead]:
    """The wrappers for what `find_rows` found, by the name of the layer they stand for; the model is as it was."""
    embedding, head = base_embedding(model), base_head(model)
    wrapped: dict[str, TokenRows | TiedHead] = {}
    for name, ids in rows.items():
        wrapped[name] = TokenRows(model.get_submodule(name), ids)
    if tied(model):
        tokens = next((w for w in wrapped.values() if isinstance(w, TokenRows) and w.base_layer is embedding), None)
        name = next(name for name, module in model.named_modules() if module is head)
        if tokens is not None and head is not None:
            wrapped[name] = TiedHead(head, tokens)
    return wrapped


def tied(model: nn.Module) -> bool:
    """Whether the output head multiplies by the embedding's own matrix."""
    embedding, head = base_embedding(model), base_head(model)
    return embedding is not None and head is not None and head.weight is embedding.weight


def base_embedding(model: nn.Module) -> nn.Embedding | None:
    """The input embedding without what is around it."""
    found = _plain(model, "get_input_embeddings")
    return found if isinstance(found, nn.Embedding) else None


def base_head(model: nn.Module) -> nn.Linear | None:
    """The output head without what is around it, if it is a linear layer."""
    found = _plain(model, "get_output_embeddings")
    return found if isinstance(found, nn.Linear) else None


def _plain(model: nn.Module, getter: str) -> Any:
    try:
        found = getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None
    return getattr(found, "base_layer", found)


# --- new tokens -----------------------------------------------------------------------------------


def add_tokens(model: nn.Module, tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Have `tokenizer` know `tokens`, and `model` have rows for them; returns their ids, for `train_tokens`.

    What the tokenizer knows already keeps its id. A new row starts as the mean of all. Raises UsageError where the
    model carries an adapter.
    """
    ids = know(tokenizer, tokens)
    enlarge(model, len(tokenizer))
    return ids


def know(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Add those of `tokens` that `tokenizer` lacks, as plain text that is never split; returns the ids of all."""
    from transformers import AddedToken

    if bad := [token for token in tokens if not token.strip()]:
        raise UsageError(f"new tokens must be of more than blanks: {listing(map(repr, bad))}")
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens if token not in known])
    found: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    return tuple(dict.fromkeys(found))


@torch.no_grad()
def enlarge(model: nn.Module, rows: int) -> bool:
    """Give embedding and head at least `rows` rows, each new one the mean of those there are; whether any was needed.

    Tied layers stay tied. The rows that exist keep every bit.
    """
    if getattr(model, "_lorafit", None) is not None:
        raise UsageError("this model carries an adapter: add the tokens before it is put in")
    made: dict[int, nn.Parameter] = {}
    for layer in (base_embedding(model), base_head(model)):
        if layer is not None and len(layer.weight) < rows:
            _refuse_slices(layer)
        for key, old in list(layer.named_parameters(recurse=False)) if layer is not None else ():
            if len(old) < rows:
                made.setdefault(id(old), _longer(old, rows))
                setattr(layer, key, made[id(old)])
        if layer is not None:
            setattr(layer, "num_embeddings" if isinstance(layer, nn.Embedding) else "out_features", len(layer.weight))
    if made:
        model.config.get_text_config().vocab_size = rows  # type: ignore[union-attr, operator]
        if hasattr(model, "vocab_size"):
            model.vocab_size = rows  # type: ignore[assignment]
    return bool(made)


def _refuse_slices(layer: nn.Module) -> None:
    if hasattr(layer.weight, "full_tensor"):
        raise UsageError("rows of a matrix that is dealt out over processes are neither added nor trained: no --shard")


def _longer(old: nn.Parameter, rows: int) -> nn.Parameter:
    mean = old.to(factor_dtype(old)).mean(dim=0, keepdim=True).to(old.dtype)
    new = torch.cat([old, mean.expand(rows - len(old), *old.shape[1:])])
    return nn.Parameter(new, requires_grad=old.requires_grad)
