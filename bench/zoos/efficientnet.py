"""EfficientNet-Lite0 in plain PyTorch: an image encoder and a classifier over it.

The modules are named after the tensors of the pretrained file, so that ``load_state_dict``
takes them as they are; its 1,000-class layer ``_fc`` is no part of the encoder.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Kernel, stride, expansion, channels out, and how many such blocks follow each other.
STAGES: Final = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM: Final = 32
FEATURES: Final = 1280


class Conv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's SAME: the odd pixel at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve."""
        size, stride = self.kernel_size[0], self.stride[0]
        padding: list[int] = []
        for pixels in (x.shape[3], x.shape[2]):
            total = max((-(-pixels // stride) - 1) * stride + size - pixels, 0)
            padding += [total // 2, total - total // 2]
        if padding[0] == padding[1] == padding[2] == padding[3]:
            same = (padding[0], padding[0])
            return F.conv2d(x, self.weight, None, self.stride, same, groups=self.groups)
        x = F.pad(x, padding)
        return F.conv2d(x, self.weight, None, self.stride, groups=self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Expand, convolve each channel by itself, project; added to the input where it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        if expansion != 1:
            self._expand_conv = Conv(inputs, width, 1)
            self._bn0 = _norm(width)
        self.expands = expansion != 1
        self._depthwise_conv = Conv(width, width, kernel, stride, groups=width)
        self._bn1 = _norm(width)
        self._project_conv = Conv(width, outputs, 1)
        self._bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """The encoder, the mean over all places and, if it has classes, a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._conv_stem = Conv(3, STEM, 3, 2)
        self._bn0 = _norm(STEM)
        blocks, inputs = [], STEM
        for kernel, stride, expansion, outputs, repeats in STAGES:
            for index in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, 1 if index else stride, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = Conv(inputs, FEATURES, 1)
        self._bn1 = _norm(FEATURES)
        self.classifier = nn.Linear(FEATURES, classes) if classes else None

    def embed(self, images: Tensor) -> Tensor:
        """Give [images, features] of images [images, 3, height, width]."""
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        features: Tensor = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits of a batch."""
        if self.classifier is None:
            raise TypeError("this encoder has no classes")
        logits: Tensor = self.classifier(self.embed(images))
        return logits

    def train(self, mode: bool = True) -> Classifier:
        """Train the weights, but leave batch norm the statistics of the base."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = False
        return self


def normalize(images: Tensor) -> Tensor:
    """Take [images, 3, height, width] in [0, 1] to what the encoder was trained on."""
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return (images - mean) / std
