"""What tallstore finds where it runs: programs, machine, place, store; and what is wrong with it.

Nothing here needs torch, triton or lmdb: they are looked at in processes of their own, so that one
that cannot be imported, or that ends the process, is a finding and not the end.
"""

from __future__ import annotations

from tallstore.doctor.diagnosis import Diagnosis, Problem
from tallstore.doctor.examining import examine

__all__ = ["Diagnosis", "Problem", "examine"]
