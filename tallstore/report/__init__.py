"""A page to look at: sizes, fidelity, and what the masks of a store tell.

Needs matplotlib (``pip install 'tallstore[report]'``), which is imported when a chart is drawn.
"""

from __future__ import annotations

from tallstore.report.writing import write_report

__all__ = ["write_report"]
