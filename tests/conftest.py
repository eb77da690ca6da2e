"""Shared by all tests: tiny random models of many families, and the optional material beside the checkout."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a family's configuration needs beyond the sizes above; windows of 4 so that tests leave them at once.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4, "head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "num_hidden_layers": 3},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "num_hidden_layers": 3},
    "phi3": {"original_max_position_embeddings": 128},
    "gpt2": {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "bias": False},
    "mixtral": {"num_local_experts": 4, "head_dim": 8},
}


def build(family: str, **changes: Any) -> nn.Module:
    """A tiny random causal language model of `family`, fp32, evaluation mode, the same for the same arguments."""
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **changes})
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config)
        # Random models start with zero biases and unit norms; real ones do not, and mistakes hide behind them.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    return build


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("data/chat")` is material that is not part of the repository; the test skips where it is absent."""
    root = Path(__file__).resolve().parents[2] / "shared"

    def find(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"shared/{name} is not beside this checkout")
        return root / name

    return find


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def ids(batch: int = 2, length: int = 12, vocab: int = 96) -> torch.Tensor:
    """Token ids that are the same for the same arguments."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(3, vocab, (batch, length), generator=generator)


@pytest.fixture(scope="session")
def token_ids() -> Callable[..., torch.Tensor]:
    return ids


def uneven(count: int = 24, vocab: int = 96, longest: int = 60, seed: int = 1) -> list[Any]:
    """Examples of very uneven lengths, each a random prompt and a random supervised answer."""
    from lorafit.data.chat import IGNORE, Example

    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = int(torch.randint(2, longest, (1,), generator=generator))
        prompt = int(torch.randint(1, length, (1,), generator=generator))
        tokens = torch.randint(3, vocab, (length,), generator=generator).tolist()
        labels = [IGNORE] * prompt + tokens[prompt:]
        made.append(Example(ids=tokens, labels=labels, source=f"row {number}"))
    return made


@pytest.fixture(scope="session")
def examples() -> Callable[..., list[Any]]:
    return uneven


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """A test that asks for `family` runs once for each."""
    return str(request.param)


def shake(model: nn.Module, seed: int = 3) -> nn.Module:
    """Give the trained parameters values as after training: no B at 0, the update about a third of the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(parameter.dtype))
    return model


def kept(model: nn.Module, rows: list[Any]) -> int:
    """Bytes that autograd holds between forward and backward of `rows` as one pass, the model's own left out."""
    from lorafit import Batches
    from lorafit.data.batches import collate
    from lorafit.training.attention import row_attention
    from lorafit.training.loop import plan_passes

    passes = plan_passes(model, Batches(rows))
    batch = collate(rows, packed=passes.packed)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage  # kept, so that its address is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), row_attention(model, batch):
        passes.loss(model, batch, 1)
    return sum(storage.nbytes() for storage in held.values())


@pytest.fixture(scope="session")
def without_experts() -> Callable[[str], dict[str, Any]]:
    """Settings for what only linear layers can have: DoRA, dropout, a start that is kept."""
    return lambda family: {"exclude": ("experts", "gate")} if family == "mixtral" else {}


@pytest.fixture
def kept_bytes() -> Callable[..., int]:
    return kept


@pytest.fixture
def shaken() -> Callable[..., nn.Module]:
    return shake


def run_pass(model: nn.Module, rows: list[Any], context: Any) -> tuple[float, list[torch.Tensor]]:
    """The loss of `rows` as one pass, run inside `context`, and the gradient of everything that is trained."""
    from lorafit import Batches
    from lorafit.training.attention import row_attention
    from lorafit.training.loop import plan_passes

    batches = Batches(rows, len(rows))
    passes = plan_passes(model, batches)
    (batch,) = passes.window(batches, 0)
    model.zero_grad()
    with context, row_attention(model, batch):
        loss = passes.loss(model, batch, 1)
        loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.fixture
def one_pass() -> Callable[..., tuple[float, list[torch.Tensor]]]:
    return run_pass
