"""How much memory training will take, known from shapes alone."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafit.lora.inject import plain_modules

# What autograd keeps per token is about the inputs and outputs of all linear layers, in the base's precision and in
# part (norms, activation functions) in fp32. Measured on seven families this is right to about a third; GPT-2, whose
# activation function is spelled out in many steps, keeps twice as much.
FP32_SHARE = 1.5
FP32_WITH_ADAMW = 4 * 4  # bytes of a weight, its gradient and two moments


def estimate(model: nn.Module, tokens: int) -> str:
    """One line about training `model`, which carries its adapter, with `tokens` in a forward pass; reads no weight."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [m for m in plain_modules(model).values() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    width = sum(sum(layer.weight.shape) for layer in layers)
    precision = frozen[0].element_size() if frozen else 4
    parts = {
        "base": sum(p.nbytes for p in frozen),
        "adapter with gradients and optimizer": trained * FP32_WITH_ADAMW,
        f"activations of {tokens:,} tokens": int(tokens * width * (precision + FP32_SHARE)),
    }
    listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    return f"memory, estimated: {sum(parts.values()) / 2**20:,.0f} MiB ({listed})"
