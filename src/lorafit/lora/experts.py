"""LoRA on a weight that belongs to no linear layer: stacks of experts, and the routers before them.

transformers keeps the experts of a block in one parameter of a module that multiplies with it in its own way:

    W (experts, out, in)    ΔW_e = s·B_e·A_e    A (experts·r, in), expert by expert    B (out, r·experts), rank by rank

These layouts are PEFT's (`target_parameters`). The module's code runs as it is: for the length of its forward, the name
of the parameter stands for a `LowRankSum`, a tensor that is W + s·B·A and answers the products that experts are made of
without making the sum,

    (W_e + s·B_e·A_e)·x  =  W_e·x + s·B_e·(A_e·x)

so that an expert costs what the tokens that meet it cost. Anything else that is asked of it is answered with the sum.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafit.config import LoraConfig
from lorafit.errors import ModelError, UsageError, listing
from lorafit.lora.inits import Init, factor_dtype, find_init
from lorafit.lora.layers import LoraLinear
from lorafit.lora.weights import gathered, is_readable


class LoraParameter(LoraLinear):
    """LoRA on the parameter `parameter`, (experts, out, in) or (out, in), of whatever `base_layer` is.

    A module whose `is_transposed` is true keeps its stacks as (experts, in, out). Several parameters of one module are
    wrappers in each other, the last one outermost, as in PEFT: that is where the names in the file come from.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, parameter: str, **options: Any) -> None:
        self.parameter = parameter
        trained = [p for p in base_layer.parameters() if p.requires_grad and isinstance(base_layer, LoraParameter)]
        super().__init__(base_layer, *args, **options)
        for factor in trained:
            factor.requires_grad_(True)

    @property
    def holder(self) -> nn.Module:
        """The module of the model, below all wrappers."""
        base: nn.Module = self.base_layer
        return base.holder if isinstance(base, LoraParameter) else base

    def base_weight(self) -> Tensor:
        return turned(self.holder, gathered(self._held))

    @property
    def _held(self) -> Tensor:
        held = self.holder._parameters[self.parameter]  # not by getattr, which may find the sum
        assert held is not None
        return held

    def start(self, W: Tensor, init: Init) -> None:
        pairs = [init(W_e, self.r, self.scale) for W_e in W.reshape(-1, *W.shape[-2:])]
        A = torch.cat([A for A, _ in pairs])
        B = torch.stack([B for _, B in pairs], dim=-1).flatten(1)
        super().start(W, init.made((A, B)))

    @staticmethod
    def tensor_shapes(*sizes: int) -> dict[str, tuple[int, ...]]:
        """For (out, in, r) or (experts, out, in, r)."""
        *experts, out, in_, r = sizes
        rows = r * (experts[0] if experts else 1)
        return LoraLinear.tensor_shapes(out, in_, rows)

    def matrices(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        if self._held.ndim == 2:
            return A, B
        experts = self._held.shape[0]
        return A.view(experts, self.r, -1), B.view(-1, self.r, experts).permute(2, 0, 1)

    def merged_weight(self) -> Tensor:
        """W + s·B·A, summed expert by expert in fp32 and rounded once to W's dtype, (…, out, in)."""
        W = self.base_weight()
        A, B = self.matrices(*self.update)
        parts = [(W, A, B)] if W.ndim == 2 else zip(W, A, B, strict=True)
        sums = [(W_e.to(factor_dtype(W)) + self.scale * (B_e @ A_e)).to(W.dtype) for W_e, A_e, B_e in parts]
        return torch.stack(sums).view(W.shape)

    def write_merged(self) -> nn.Module:
        held = self._held
        merged = turned(self.holder, self.merged_weight()).contiguous()
        self.holder._parameters[self.parameter] = nn.Parameter(merged, requires_grad=held.requires_grad)
        return self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module itself computes, with W + s·B·A in W's place."""
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        A, B = self.matrices(*self.update)
        L, R = (A.mT, B.mT) if turns(self.holder, self._held) else (B, A)
        names = vars(self.holder)  # what is in here goes before parameters
        names[self.parameter] = LowRankSum(self._held, L, R, self.scale)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            del names[self.parameter]

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.__getattr__("weight")
        return weight

    def __getattr__(self, name: str) -> Any:
        # Models look at their own children (gate.top_k, experts.num_experts).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith(("base_layer", "lora_", "__")):
                raise
            if name == self.parameter and self.enabled:
                return turned(self.holder, self.merged_weight())
            return getattr(self.base_layer, name)

    def extra_repr(self) -> str:
        return f"parameter={self.parameter}, {super().extra_repr()}"


# --- which weights these are ------------------------------------------------------------------------


def turns(module: nn.Module, weight: Tensor) -> bool:
    """Whether `module` keeps `weight` as (experts, in, out). The attribute is transformers', and what PEFT goes by."""
    return weight.ndim == 3 and bool(getattr(module, "is_transposed", False))


def turned(module: nn.Module, weight: Tensor) -> Tensor:
    """From the module's own layout to (…, out, in), and back."""
    return weight.mT if turns(module, weight) else weight


def held_weights(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The matrices and stacks of matrices that a module multiplies with itself: full name -> (…, out, in).

    A linear layer with a forward of its own counts: some routers are one that answers with the experts to take.
    """
    return {
        f"{name}.{key}": tuple(turned(module, weight).shape)
        for name, module in modules.items()
        if not is_readable(module) or (isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward)
        for key, weight in module.named_parameters(recurse=False)
        if weight.ndim in (2, 3) and weight.is_floating_point()
    }


def expert_weights(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Of the weights held so, the experts and their routers: full name -> how many matrices lie in one.

    A stack of n matrices belongs to experts if something beside it turns the vectors they take into n numbers: the
    router. A stack whose output is twice what another one there takes in holds two layers in one, the gate and the
    value of a gated unit; they count as two. What a family calls them plays no part.
    """
    held = held_weights(modules)
    linear = {f"{n}.weight": (m.out_features, m.in_features) for n, m in modules.items() if isinstance(m, nn.Linear)}
    outputs = {**held, **linear}
    found: dict[str, int] = {}
    for name, shape in held.items():
        owner = name.rpartition(".")[0]
        block = f"{owner.rpartition('.')[0]}." if "." in owner else ""
        beside = {n: s for n, s in outputs.items() if n.startswith(block) and not n.startswith(f"{owner}.")}
        routers = [n for n, s in beside.items() if len(s) == 2 and s[0] == shape[0] and s[1] in shape[1:]]
        if len(shape) == 3 and min(shape) > 1 and routers:
            stacks = [s for n, s in held.items() if n.startswith(block) and n != name and len(s) == 3]
            found[name] = 2 if any(_feeds(shape, other) for other in stacks) else 1
            found |= {router: 1 for router in routers if router in held}
    return {name: found[name] for name in held if name in found}


def _feeds(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether half of what `one` puts out is what `other` takes in, and the other way round; in either layout."""
    (_, a, b), (_, c, d) = one, other
    return (a == 2 * d and b == c) or (b == 2 * c and a == d)


def refuse_unfit(names: list[str], config: LoraConfig) -> None:
    """Experts get plain LoRA: their module's own code multiplies, and there is no x to drop parts of."""
    init = find_init(config.init)
    reasons = {
        f"variant '{config.variant}'": config.variant != "lora",
        f"dropout {config.dropout:g}": config.dropout > 0,
        f"init '{config.init}'": init.start == "kept" or init.statistic is not None,
    }
    said = [reason for reason, applies in reasons.items() if applies]
    if names and said:
        last = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in names})
        raise UsageError(
            f"{listing(said)} cannot be had for weights outside of linear layers ({listing(names, 2)}): "
            f"leave it out, or exclude {','.join(last)}"
        )


# --- the sum that is not made ------------------------------------------------------------------------


class LowRankSum(Tensor):
    """W + s·L·R as a tensor: W (…, rows, columns), L (…, rows, r), R (…, r, columns).

    Products with it are W's and the factors' own. Every other function sees the sum, made in the precision of L and R
    and rounded once.
    """

    W: Tensor
    L: Tensor
    R: Tensor
    scale: float
    recorded: bool

    @staticmethod
    def __new__(cls, W: Tensor, L: Tensor, R: Tensor, scale: float) -> "LowRankSum":
        shell: LowRankSum = Tensor._make_wrapper_subclass(
            cls, W.shape, strides=W.stride(), dtype=W.dtype, device=W.device
        )
        return shell

    def __init__(self, W: Tensor, L: Tensor, R: Tensor, scale: float) -> None:
        self.W, self.L, self.R, self.scale = W, L, R, scale
        self.recorded = torch.is_grad_enabled()

    def made_of(self, change: Callable[[Tensor], Tensor], turn: bool = False) -> "LowRankSum":
        """The same sum of changed parts."""
        L, R = (self.R, self.L) if turn else (self.L, self.R)
        made = LowRankSum(change(self.W), change(L), change(R), self.scale)
        made.recorded = self.recorded
        return made

    def dense(self) -> Tensor:
        return (self.W.to(self.L.dtype) + self.scale * (self.L @ self.R)).to(self.W.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = func.__self__.__name__ if name == "__get__" else name
        with torch._C.DisableTorchFunctionSubclass():
            if name in SHAPE:
                return func(*args, **kwargs)
            if name in PRODUCTS:
                result = PRODUCTS[name](func, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            return func(*_summed(args), **dict(zip(kwargs, _summed(kwargs.values()), strict=True)))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ModelError(f"{func} takes an adapted weight past Python: exclude the module that calls it")

    def times(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """L and R in the precision of the other factor, on record."""
        if self.recorded and not torch.is_grad_enabled():
            raise ModelError("an adapted weight is used where autograd does not look: exclude the module that does so")
        return self.L.to(dtype), self.R.to(dtype)


def _summed(values: Any) -> list[Any]:
    made = []
    for value in values:
        if isinstance(value, LowRankSum):
            value.times(value.dtype)
            made.append(value.dense())
        else:
            made.append(type(value)(_summed(value)) if type(value) in (list, tuple) else value)
    return made


def _linear(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """(…, in) -> (…, out)"""
    if isinstance(x, LowRankSum) or not isinstance(weight, LowRankSum) or weight.ndim != 2:
        return NotImplemented
    L, R = weight.times(x.dtype)
    y = F.linear(x, weight.W, bias)
    return y + (weight.scale * F.linear(F.linear(x, R), L)).to(y.dtype)


def _matmul(func: Any, a: Tensor, b: Tensor) -> Any:
    """a·b, one of them a sum, as matrices or batches of them."""
    if min(a.ndim, b.ndim) < 2:
        return NotImplemented
    if isinstance(b, LowRankSum) and not isinstance(a, LowRankSum):
        L, R = b.times(a.dtype)
        return a @ b.W + b.scale * ((a @ L) @ R)
    if isinstance(a, LowRankSum) and not isinstance(b, LowRankSum):
        L, R = a.times(b.dtype)
        return a.W @ b + a.scale * (L @ (R @ b))
    return NotImplemented


def _grouped(func: Any, x: Tensor, weight: Tensor, offs: Tensor | None = None, **options: Any) -> Any:
    """Rows of x (n, in), in order of their experts, each times its expert's matrix of (experts, in, out)."""
    asked = [option for option in options.values() if option is not None]
    if isinstance(x, LowRankSum) or not isinstance(weight, LowRankSum) or (x.ndim, weight.ndim) != (2, 3) or asked:
        return NotImplemented
    L, R = weight.times(x.dtype)
    # The kernel wants rows of whole 16 bytes: eight numbers of two.
    more = -L.shape[-1] % 8
    L, R = F.pad(L, (0, more)).contiguous(), F.pad(R, (0, 0, 0, more)).contiguous()
    return func(x, weight.W, offs=offs) + weight.scale * func(func(x, L, offs=offs), R, offs=offs)


def _item(func: Any, stack: LowRankSum, index: Any) -> Any:
    """Some of the experts: by number, numbers or slice."""
    numbers = type(index) in (int, slice) or (isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64))
    if stack.ndim != 3 or not numbers:
        return NotImplemented
    return stack.made_of(lambda part: part[index])


def _transpose(func: Any, matrix: LowRankSum, *dims: int) -> Any:
    if dims and {dim % matrix.ndim for dim in dims} != {matrix.ndim - 2, matrix.ndim - 1}:
        return NotImplemented
    return matrix.made_of(lambda part: part.mT, turn=True)


PRODUCTS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), _matmul),
    "__rmatmul__": lambda func, a, b: _matmul(func, b, a),
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), _grouped),
    "__getitem__": _item,
    **dict.fromkeys(("transpose", "swapaxes", "mT", "t"), _transpose),
    "T": lambda func, matrix: _transpose(func, matrix) if matrix.ndim == 2 else NotImplemented,
    "data_ptr": lambda func, matrix: matrix.W.data_ptr(),
}
SHAPE = ("shape", "size", "dim", "ndim", "numel", "stride", "dtype", "device", "is_floating_point", "requires_grad")
