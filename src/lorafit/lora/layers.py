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
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorafit.errors import UsageError
from lorafit.lora.fused import Parts, low_rank_linear
from lorafit.lora.inits import Init, factor_dtype, find_init
from lorafit.lora.weights import gathered, read_weight, whole_weight, write_weight

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

    pair_names = ("lora_A.weight", "lora_B.weight")
    lora_A0: Tensor | None
    lora_B0: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        init: str | Init = "kaiming",
        rslora: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r = r
        self.alpha = alpha
        self.scale = scale_of(r, alpha, rslora)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.enabled = True
        self.register_buffer("lora_A0", None)
        self.register_buffer("lora_B0", None)
        for parameter in base_layer.parameters():
            parameter.requires_grad_(False)
        with torch.no_grad():
            self.start(self.base_weight(), find_init(init) if isinstance(init, str) else init)

    def base_weight(self) -> Tensor:
        """W, (out, in): all of it, wherever its slices are."""
        return whole_weight(self.base_layer)

    def start(self, W: Tensor, init: Init) -> None:
        """Make A and B and give them their first values; keep these where B·A is not 0."""
        # By rows: AdamW's fused kernel goes through parameter and moments side by side, whatever their strides.
        A, B = (factor.contiguous() for factor in init(W, self.r, self.scale))
        self.lora_A = _thin(A)
        self.lora_B = _thin(B)
        if init.start == "kept":
            self.lora_A0, self.lora_B0 = A.clone(), B.clone()

    @staticmethod
    def tensor_shapes(out: int, in_: int, r: int) -> dict[str, tuple[int, ...]]:
        """What a file holds for one such layer: names below the layer's own, and shapes."""
        return {"lora_A.weight": (r, in_), "lora_B.weight": (out, r)}

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r): what is trained."""
        return self.lora_A.weight, self.lora_B.weight

    def matrices(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A and B, or two tensors of their shapes such as their gradients, laid out as they are multiplied."""
        return A, B

    @property
    def kept(self) -> bool:
        """Whether B·A did not start at 0, so that the start (A0, B0) is kept and the difference to it learned."""
        return self.lora_A0 is not None

    @property
    def update(self) -> tuple[Tensor, Tensor]:
        """A' (r', in) and B' (out, r') with ΔW = s·B'·A': what every formula below works with.

        A and B themselves; with a kept start the pair of twice the rank that is 0 at the start, bit for bit:

            B·A − B0·A0  =  (B − B0)·A + B0·(A − A0)  =  B'·A'      A' = [A; A − A0]   B' = [B − B0, B0]

        The differences are taken here, in fp32, and only then cast: in bf16, B·A − B0·A0 would lose most of what was
        learned.
        """
        A, B = self.factors
        if self.lora_A0 is None or self.lora_B0 is None:
            return A, B
        return torch.cat([A, A - self.lora_A0]), torch.cat([B - self.lora_B0, self.lora_B0], dim=1)

    def moved(self) -> bool:
        """Whether ΔW is anything but 0."""
        A, B = self.matrices(*self.update)
        return bool((A.any(dim=-1) & B.any(dim=-2)).any())

    def saved(self) -> dict[str, Tensor]:
        """The adapter's tensors as a file holds them, by their names below the layer's own."""
        own, pair = self.state_dict(keep_vars=True), dict(zip(self.pair_names, self.update, strict=True))
        return {name: pair[name] if name in pair else own[name] for name in self.tensor_shapes(0, 0, 0)}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Be the layer that `saved` these, to the same update bit for bit."""
        own = self.state_dict(keep_vars=True)
        if self.kept:
            r, (A, B) = self.r, (tensors[f"lora_{name}.weight"].to(self.lora_A0) for name in "AB")
            tensors = {
                **tensors,
                "lora_A.weight": A[:r],
                "lora_A0": subtrahend(A[:r], A[r:]),
                "lora_B.weight": -subtrahend(-B[:, r:], B[:, :r]),
                "lora_B0": B[:, r:],
            }
        for key, tensor in tensors.items():
            own[key].copy_(tensor)

    def delta(self) -> Tensor:
        """ΔW = s·B'·A', dense (out, in), in the precision of A and B."""
        A, B = self.matrices(*self.update)
        return (B @ A).mul_(self.scale)

    def merged_weight(self) -> Tensor:
        """W + s·B·A, summed in fp32 and rounded once to W's dtype, (out, in)."""
        W = self.base_weight()
        return self.delta().add_(W).to(W.dtype)

    @torch.no_grad()
    def bound(self) -> float:
        """No value of `merged_weight` is larger; NaN or infinite where W, A or B is.

        max|W| + s·max‖b‖·max‖a‖, with b a row of B' and a a column of A'.
        """
        A, B = self.matrices(*self.update)
        low, high = self.base_weight().aminmax()
        largest = torch.maximum(-low, high).to(A.dtype)
        return float(largest + self.scale * B.norm(dim=-1).amax() * A.norm(dim=-2).amax())

    def write_merged(self) -> nn.Module:
        """Make the merged weight the base layer's own; returns the layer that has it."""
        return write_weight(self.base_layer, self.merged_weight())

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
        return self._added_to(self.base_layer(x), x)

    def _added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """What comes out of the layer if y (…, out) comes out of its base."""
        return y + self._low_rank(x).to(y.dtype)

    def _low_rank(self, x: Tensor) -> Tensor:
        """s·B'·A'·dropout(x), (…, out)"""
        A, B = self.update
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

    @property
    def parts(self) -> Parts:
        """What `low_rank_linear` works with."""
        return Parts(read_weight(self.base_layer), self.bias, *self.update, self.scale, self.gain)

    @property
    def gain(self) -> Tensor | None:
        """What multiplies all but the bias, (out,), where something does."""
        return None

    @property
    def drops(self) -> bool:
        """Whether A sees less than the base layer does."""
        return self.training and isinstance(self.dropout, nn.Dropout)

    def _fused(self, x: Tensor) -> Tensor:
        """`forward` with a hand-written backward."""
        rows = x.reshape(-1, x.shape[-1])
        (y,) = low_rank_linear(rows, self.dropout(rows) if self.drops else None, [self.parts])
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}"


class DoraLinear(LoraLinear):
    """y = m ⊙ (W + s·B·A) x / ‖W + s·B·A‖ + b        m (out,), the norm taken over each row

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353; the norm is a constant
    in the backward pass (§4.3 there). m starts at ‖W‖, so that the quotient starts at exactly 1.
    """

    base_norm_squared: Tensor

    def start(self, W: Tensor, init: Init) -> None:
        super().start(W, init)
        self.register_buffer("base_norm_squared", W.to(factor_dtype(W)).square().sum(dim=1), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.row_norm())

    @staticmethod
    def tensor_shapes(out: int, in_: int, r: int) -> dict[str, tuple[int, ...]]:
        return {**LoraLinear.tensor_shapes(out, in_, r), "lora_magnitude_vector": (out,)}

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """‖W + s·B·A‖ per row, (out,), without the sum: ‖w‖² + 2s·w·(BA) + s²‖BA‖², all r wide."""
        A, B = self.update
        W = self.base_weight()
        cross = ((W @ A.to(W.dtype).T).to(B.dtype) * B).sum(dim=1)
        square = ((B @ (A @ A.T)) * B).sum(dim=1)
        squared = self.base_norm_squared + 2 * self.scale * cross + self.scale**2 * square
        return squared.clamp_min(TINY).sqrt()

    def merged_weight(self) -> Tensor:
        W = self.base_weight()
        V = self.delta().add_(W)
        norm = V.square().sum(dim=1).clamp_min(TINY).sqrt()
        return (V * (self.lora_magnitude_vector / norm).unsqueeze(1)).to(W.dtype)

    @property
    def gain(self) -> Tensor:
        """m / ‖W + s·B·A‖, (out,)"""
        return self.lora_magnitude_vector / self.row_norm()

    def _added_to(self, y: Tensor, x: Tensor) -> Tensor:
        Wx = y if self.bias is None else y - self.bias
        gain = self.gain
        # y plus a difference that is exactly 0 at the start, so that step 0 is the base model bit for bit.
        return y + (gain - 1).to(y.dtype) * Wx + gain.to(y.dtype) * self._low_rank(x).to(y.dtype)


class LoraEmbedding(LoraLinear):
    """y = E[token] + s·B·A[:, token]        E (vocab, dim)   A (r, vocab)   B (dim, r)

    The same ΔW = s·B·A on the transposed table. A is looked up here, so A starts at 0 and B at N(0, 1), as in
    loralib.
    """

    pair_names = ("lora_embedding_A", "lora_embedding_B")

    def start(self, W: Tensor, init: Init) -> None:
        dim, vocab = W.shape
        A = torch.zeros(self.r, vocab, dtype=factor_dtype(W), device=W.device)
        if init.name == "gaussian_both":
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
        if hasattr(base_layer, "unshard"):  # FSDP2's, which hooks would be copied with
            raise UsageError("embedding and head cannot be trained in full where they are dealt out: no --shard")
        self.trained = copy.deepcopy(base_layer)
        for module in self.trained.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if hasattr(parameter, "full_tensor"):  # what is trained is whole in every process
                    setattr(module, name, nn.Parameter(gathered(parameter.detach())))
        self.enabled = True
        self.base_layer.requires_grad_(False)
        self.trained.requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.trained if self.enabled else self.base_layer)(*args, **kwargs)

    def saved(self) -> dict[str, Tensor]:
        """The trained module's tensors, by its own names."""
        return self.trained.state_dict(keep_vars=True)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Be the module that `saved` these."""
        own = self.trained.state_dict(keep_vars=True)
        for key, tensor in tensors.items():
            own[key].copy_(tensor)

    def __getattr__(self, name: str) -> Any:
        # Models look at their own children (lm_head.weight, norm.eps): answer with the module in use.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "trained", "enabled") or name.startswith("__"):
                raise
            return getattr(self.trained if self.enabled else self.base_layer, name)


VARIANTS: dict[str, type[LoraLinear]] = {"lora": LoraLinear, "dora": DoraLinear}


def formula(base_layer: nn.Module, variant: str) -> type[LoraLinear]:
    """The class that adapts `base_layer`."""
    return LoraEmbedding if isinstance(base_layer, nn.Embedding) else VARIANTS[variant]


def subtrahend(a: Tensor, difference: Tensor) -> Tensor:
    """An x for which a − x rounds to `difference`, element by element; one exists if it ever was such a difference."""
    x = a - difference
    for toward in (-torch.inf, torch.inf):
        other = torch.nextafter(x, torch.full_like(x, toward))
        x = torch.where((a - x != difference) & (a - other == difference), other, x)
    return x


def _thin(weight: Tensor) -> nn.Linear:
    """A bias-free linear layer around `weight`; a module of its own because PEFT's keys end in `.weight`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer
