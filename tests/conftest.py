"""Kernels run for real where there is a GPU, and in Triton's interpreter everywhere else."""

import os

import torch

if not torch.cuda.is_available():
    # Before the first kernel is defined: Triton decides then.
    os.environ["TRITON_INTERPRET"] = "1"
