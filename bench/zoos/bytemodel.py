"""A byte-level language model in plain PyTorch: a small causal transformer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """The size of a model. Every byte is a token of its own, so there are 256."""

    width: int = 256
    layers: int = 6
    heads: int = 8
    context: int = 256


class Layer(nn.Module):
    """Attention and a feed-forward half, each normalized before and added."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to [batch, length, width]."""
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return out


class ByteModel(nn.Module):
    """Predicts each byte of a text from those before it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, 256, bias=False)
        # The residual stream is a sum of 2 * layers outputs; each begins small.
        small = 0.02 / (2 * shape.layers) ** 0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                ends_a_half = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=small if ends_a_half else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, given: Tensor) -> Tensor:
        """Give the logits of each next byte after texts [batch, length]."""
        x = self.tokens(given.long()) + self.positions.weight[: given.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x)).float()
        return logits

    def losses(self, text: Tensor) -> Tensor:
        """Give the mean loss, in nats a byte, of each of texts [batch, length + 1]."""
        logits = self(text[:, :-1])
        each = F.cross_entropy(logits.transpose(1, 2), text[:, 1:].long(), reduction="none")
        return each.mean(1)
