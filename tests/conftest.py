"""Fixtures of several files; kernels run where there is a GPU, else in Triton's interpreter."""

import os

import torch
from stored import small_disk, stored

__all__ = ["small_disk", "stored"]  # fixtures

if not torch.cuda.is_available():
    # Before the first kernel is defined: Triton decides then.
    os.environ["TRITON_INTERPRET"] = "1"
