"""A BERT encoder and a text classifier over it, in plain PyTorch.

The modules are named after the tensors of a Hugging Face BERT checkpoint, so that
``load_state_dict`` takes such a file as it is and ``state_dict`` gives it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class BertConfig:
    """Those fields of a checkpoint's config.json which the encoder needs."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Take the known fields of a parsed config.json and leave the others."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


class Embeddings(nn.Module):
    """Word, position and token type embeddings, summed and normalized."""

    position_ids: Tensor

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        # Registered because older checkpoints carry it, though it is only arange.
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed token ids of one sentence each, so of token type 0 throughout."""
        positions = self.position_embeddings(self.position_ids[:, : ids.shape[1]])
        total = self.word_embeddings(ids) + positions + self.token_type_embeddings.weight[0]
        out: Tensor = self.dropout(self.LayerNorm(total))
        return out


class SelfAttention(nn.Module):
    """Multi-head attention without its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.drop = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend from every token to the tokens the mask lets through."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        drop = self.drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=drop)
        return mixed.transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """Projection, dropout, residual connection and layer norm."""

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Project ``x`` and add it to the residual stream."""
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return out


class Dense(nn.Module):
    """A linear layer under the name ``dense``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)


class Layer(nn.Module):
    """One transformer layer, normalized after each half."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        attention = {"self": SelfAttention(config), "output": AddNorm(config, config.hidden_size)}
        self.attention = nn.ModuleDict(attention)
        self.intermediate = Dense(config.hidden_size, config.intermediate_size)
        self.output = AddNorm(config, config.intermediate_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend, then apply the feed-forward half."""
        x = self.attention["output"](self.attention["self"](x, mask), x)
        out: Tensor = self.output(F.gelu(self.intermediate.dense(x)), x)
        return out


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Apply every layer in turn."""
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Classifier(nn.Module):
    """A BERT encoder, mean pooling and, if it has classes, a linear head.

    The checkpoint's pooler is kept, unused and so untrained: without it a fine-tune
    would lack two of the base's tensors.
    """

    def __init__(self, config: BertConfig, classes: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Dense(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, classes) if classes else None

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Give the mean of the last hidden states over each text's own tokens."""
        x = self.encoder(self.embeddings(ids), mask[:, None, None, :])
        weight = mask.unsqueeze(-1).to(x.dtype)
        pooled: Tensor = (x * weight).sum(1) / weight.sum(1)
        return pooled

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Give the logits of a batch of padded token ids."""
        if self.classifier is None:
            raise TypeError("this encoder has no classes")
        logits: Tensor = self.classifier(self.embed(ids, mask))
        return logits
