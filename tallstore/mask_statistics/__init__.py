"""What the masks of a store tell: density, use by how many tasks, overlap, cosines."""

from __future__ import annotations

from tallstore.mask_statistics.results import MaskStatistics, Matrix, PartStatistics, TaskUse, Use
from tallstore.mask_statistics.studying import study

__all__ = ["MaskStatistics", "Matrix", "PartStatistics", "TaskUse", "Use", "study"]
