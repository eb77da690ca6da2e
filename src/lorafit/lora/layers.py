"""LoRA, as a layer: y = W x + s·B·A·x, with W frozen and only the thin A and B trained.

            x (…, in)
           /         \\
    W (out, in)    A (r, in)          r ≪ in, out: r·(in + out) trained numbers instead of in·out
     frozen        B (out, r)         s = alpha / r
           \\         /
            y (…, out)

Each formula is one class with two methods: `merged_weight`, what the layer *means* as one dense matrix, and
`forward`, how to compute it cheaply. A test holds the two equal. The base layer is held, never copied, and
never written to. The children are called `lora_A`, `lora_B` (and so on) because these names are PEFT's file
format: saving renames nothing. A and B are kept in fp32 and cast to the dtype of x where they are used.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorafit.errors import UsageError, nearest
from lorafit.lora.fused import LowRankLinear
from lorafit.lora.inits import INITS, factor_dtype
from lorafit.lora.weights import read_weight

TINY = 1e-30  # a squared norm below this is a row of zeros


def scale_of(r: int, alpha: float, rslora: bool) -> float:
    """s = alpha / r, or alpha / √r with `rslora` (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / r**0.5 if rslora else alpha / r


class LoraLinear(nn.Module):
    """y = W x + b + s·B·A·dropout(x)        x (…, in)   W (out, in)   A (r, in)   B (out, r)

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
    s = `scale_of(r, alpha, rslora)`. `base_layer` is an nn.Linear, a transformers Conv1D, or anything registered in
    `weights.py`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        init: str = "kaiming",
        rslora: bool = False,
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise UsageError(f"unknown init '{init}'{nearest(init, INITS)}; known: {', '.join(INITS)}")
        self.base_layer = base_layer
        self.r = r
        self.alpha = alpha
        self.scale = scale_of(r, alpha, rslora)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.enabled = True
        for parameter in base_layer.parameters():
            parameter.requires_grad_(False)
        with torch.no_grad():
            self.start(read_weight(base_layer), init)

    def start(self, W: Tensor, init: str) -> None:
        """Make A and B and give them their first values."""
        A, B = INITS[init](W, self.r, self.scale)
        self.lora_A = _thin(A)
        self.lora_B = _thin(B)

    @staticmethod
    def tensor_shapes(out: int, in_: int, r: int) -> dict[str, tuple[int, ...]]:
        """What a file holds for one such layer: names below the layer's own, and shapes."""
        return {"lora_A.weight": (r, in_), "lora_B.weight": (out, r)}

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        return self.lora_A.weight, self.lora_B.weight

    def delta(self) -> Tensor:
        """ΔW = s·B·A, dense (out, in), in the precision of A and B."""
        A, B = self.factors
        return self.scale * (B @ A)

    def merged_weight(self) -> Tensor:
        """W + s·B·A, summed in fp32 and rounded once to W's dtype, (out, in)."""
        W = read_weight(self.base_layer)
        return (W.to(factor_dtype(W)) + self.delta()).to(W.dtype)

    @property
    def weight(self) -> Tensor:
        """For models that multiply by their layer's weight themselves, as Mamba does: laid out as the base's."""
        W = self.merged_weight() if self.enabled else read_weight(self.base_layer)
        return W.T if isinstance(self.base_layer, Conv1D | nn.Embedding) else W

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        if not self.enabled:
            result: Tensor = self.base_layer(x)
            return result
        if self._plain(x):
            return self._fused(x)
        y: Tensor = self.base_layer(x)
        return y + self._low_rank(x).to(y.dtype)

    def _low_rank(self, x: Tensor) -> Tensor:
        """s·B·A·dropout(x), (…, out)"""
        A, B = self.factors
        return self.scale * F.linear(F.linear(self.dropout(x), A.to(x.dtype)), B.to(x.dtype))

    def _plain(self, x: Tensor) -> bool:
        """Whether the base is an ordinary frozen matrix, so that the hand-written backward is the same
        function.

        Hooks, replaced forwards (accelerate's), subclasses (quantised layers), sharded weights and autocast
        go the plain way above.
        """
        base = self.base_layer
        return (
            type(base) in (nn.Linear, Conv1D)
            and "forward" not in vars(base)
            and type(base.weight) is nn.Parameter
            and not base.weight.requires_grad
            and not (base.bias is not None and base.bias.requires_grad)
            and base.weight.dtype == x.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        )

    def _fused(self, x: Tensor) -> Tensor:
        A, B = self.factors
        rows = x.reshape(-1, x.shape[-1])
        dropped = None if isinstance(self.dropout, nn.Identity) or not self.training else self.dropout(rows)
        W = read_weight(self.base_layer)
        y: Tensor = LowRankLinear.apply(rows, dropped, W, self.bias, A, B, self.scale)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}"


class DoraLinear(LoraLinear):
    """y = m ⊙ (W + s·B·A) x / ‖W + s·B·A‖ + b        m (out,), the norm taken over each row

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353; the norm is a constant
    in the backward pass (§4.3 there). m starts at ‖W‖, so that the quotient starts at exactly 1.
    """

    base_norm_squared: Tensor

    def start(self, W: Tensor, init: str) -> None:
        super().start(W, init)
        self.register_buffer("base_norm_squared", W.to(factor_dtype(W)).square().sum(dim=1), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.row_norm())

    @staticmethod
    def tensor_shapes(out: int, in_: int, r: int) -> dict[str, tuple[int, ...]]:
        return {**LoraLinear.tensor_shapes(out, in_, r), "lora_magnitude_vector": (out,)}

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """‖W + s·B·A‖ per row, (out,), without the sum: ‖w‖² + 2s·w·(BA) + s²‖BA‖², all r wide."""
        A, B = self.factors
        W = read_weight(self.base_layer)
        cross = ((W @ A.to(W.dtype).T).to(B.dtype) * B).sum(dim=1)
        square = ((B @ (A @ A.T)) * B).sum(dim=1)
        squared = self.base_norm_squared + 2 * self.scale * cross + self.scale**2 * square
        return squared.clamp_min(TINY).sqrt()

    def merged_weight(self) -> Tensor:
        W = read_weight(self.base_layer)
        V = W.to(factor_dtype(W)) + self.delta()
        norm = V.square().sum(dim=1).clamp_min(TINY).sqrt()
        return (V * (self.lora_magnitude_vector / norm).unsqueeze(1)).to(W.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if not self.enabled:
            return y
        Wx = y if self.bias is None else y - self.bias
        gain = self.lora_magnitude_vector / self.row_norm()  # (out,)
        # y plus a difference that is exactly 0 at the start, so that step 0 is the base model bit for bit.
        return y + (gain - 1).to(y.dtype) * Wx + gain.to(y.dtype) * self._low_rank(x).to(y.dtype)


class LoraEmbedding(LoraLinear):
    """y = E[token] + s·B·A[:, token]        E (vocab, dim)   A (r, vocab)   B (dim, r)

    The same ΔW = s·B·A on the transposed table. A is looked up here, so A starts at 0 and B at N(0, 1), as in
    loralib.
    """

    def start(self, W: Tensor, init: str) -> None:
        dim, vocab = W.shape
        A = torch.zeros(self.r, vocab, dtype=factor_dtype(W), device=W.device)
        if init == "gaussian_both":
            A.normal_(std=0.02)
        self.lora_embedding_A = nn.Parameter(A)
        self.lora_embedding_B = nn.Parameter(torch.randn(dim, self.r, dtype=A.dtype, device=A.device))

    @staticmethod
    def tensor_shapes(out: int, in_: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"lora_embedding_A": (r, in_), "lora_embedding_B": (out, r)}

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A, self.lora_embedding_B

    def forward(self, tokens: Tensor) -> Tensor:
        """(…) token ids -> (…, dim)"""
        y: Tensor = self.base_layer(tokens)
        if not self.enabled:
            return y
        A, B = self.factors
        update = self.scale * F.linear(F.embedding(tokens, A.T), B)
        # Gemma multiplies what it looks up by a constant; the update is part of what is looked up.
        gain = getattr(self.base_layer, "embed_scale", 1.0)
        return y + (update * (gain.to(y.dtype) if isinstance(gain, Tensor) else gain)).to(y.dtype)


class TrainedCopy(nn.Module):
    """A module trained in full: works on a copy and keeps the original, so that it can be switched off."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trained = copy.deepcopy(base_layer)
        self.enabled = True
        self.base_layer.requires_grad_(False)
        self.trained.requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.trained if self.enabled else self.base_layer)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Models look at their own children (lm_head.weight, norm.eps): answer with the module in use.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "trained", "enabled") or name.startswith("__"):
                raise
            return getattr(self.trained if self.enabled else self.base_layer, name)


VARIANTS: dict[str, type[LoraLinear]] = {"lora": LoraLinear, "dora": DoraLinear}


def _thin(weight: Tensor) -> nn.Linear:
    """A bias-free linear layer around `weight`; a module of its own because PEFT's keys end in `.weight`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer
