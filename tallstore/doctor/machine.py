"""The machine: cores, memory, and the limits that the system sets."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Final

from tallstore.doctor.diagnosis import Problem, Section

__all__ = ["machine"]

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")
#: Below this, a store of some size cannot be mapped beside everything else.
_ROOMY: Final = 1 << 40
#: The memory that packing and loading take beside the weights, and torch itself.
_LITTLE: Final = 2 << 30


def machine() -> Section:
    """What there is, and which limits are in the way."""
    space, longest = _limit("RLIMIT_AS"), _limit("RLIMIT_FSIZE")
    bits = 64 if sys.maxsize > 1 << 32 else 32
    memory, available = _memory()
    problems = []
    if bits != 64 or sys.byteorder != "little":
        what = f"a {bits}-bit, {sys.byteorder}-endian Python; stores are of 64-bit little-endian"
        problems.append(Problem(what, "use a 64-bit Python on x86-64 or ARM64"))
    if sys.platform not in ("linux", "darwin"):
        what = f"{sys.platform}: tallstore is made for Linux and macOS, and tested on Linux"
        problems.append(Problem(what, "expect locks and syncs to behave otherwise", serious=False))
    if space is not None and space < _ROOMY:
        what = f"address space is limited to {space} bytes (ulimit -v); LMDB maps whole stores"
        cure = "ulimit -v unlimited; else stores near that size cannot be opened or written"
        problems.append(Problem(what, cure, serious=False))
    if longest is not None:
        what = f"files are limited to {longest} bytes (ulimit -f)"
        cure = "ulimit -f unlimited; else a write that makes a store longer fails"
        problems.append(Problem(what, cure, serious=False))
    if available is not None and available < _LITTLE:
        what = f"{available} bytes of memory are available"
        cure = "close other programs; packing and loading take up to 2 GiB beside the weights"
        problems.append(Problem(what, cure, serious=False))
    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "bits": bits,
        "byte_order": sys.byteorder,
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "memory_bytes": memory,
        "available_bytes": available,
        "page_bytes": resource.getpagesize(),
        "address_space_limit": space,
        "file_size_limit": longest,
        "open_files_limit": _limit("RLIMIT_NOFILE"),
    }
    return Section(facts, tuple(problems))


def _limit(name: str) -> int | None:
    """A limit of this process; None where there is none."""
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> tuple[int | None, int | None]:
    """(bytes in all, bytes available), a container's limit counted; None where nobody says."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None, None
    available = None
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    most, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if most is not None and most < total:
        total = most
        if available is not None and used is not None:
            available = min(available, max(most - used, 0))
    return total, available


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group; "max"
        return None
