"""Programs and their versions, and the GPU as torch sees it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tallstore.doctor.diagnosis import Problem, Section
from tallstore.version import __version__

__all__ = ["NEEDED", "PACKAGES", "gpu", "programs"]

#: What tallstore does not do without, and from which version on: as pyproject.toml has it.
NEEDED: Final[Mapping[str, str]] = {
    "click": "8.1",
    "lmdb": "2.3",
    "numpy": "2.0",
    "torch": "2.6",
    "xxhash": "3.0",
    "zstandard": "0.22",
}
#: What else is looked for, and what it is for.
_MORE: Final[Mapping[str, str]] = {
    "triton": "weights on a GPU",
    "safetensors": "nothing: tallstore reads and writes such files itself",
    "matplotlib": "tallstore report",
}
PACKAGES: Final = (*NEEDED, *_MORE)
_TRITON: Final = "3.4"
_DATA_VERSION: Final = 1
_DRIVER: Final = Path("/proc/driver/nvidia/version")


def _numbers(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version.partition("+")[0])]


def _is_older(version: str, than: str) -> bool:
    found = _numbers(version)
    return bool(found) and found < _numbers(than)


def _is_absent(error: str, name: str) -> bool:
    return error == f"ModuleNotFoundError: No module named {name!r}"


def programs(found: Mapping[str, Mapping[str, Any]]) -> Section:
    """Versions, and whether everything that is needed is there.

    Parameters
    ----------
    found
        What `probe` gave for `PACKAGES`.
    """
    problems = []
    for name, least in NEEDED.items():
        cure = f"pip install '{name}>={least}'"
        error, version = found[name].get("error"), found[name].get("version", "")
        if error is not None:
            problems.append(Problem(f"{name} cannot be imported: {error}", cure))
        elif _is_older(version, least):
            problems.append(Problem(f"{name} {version} is older than {least}", cure))
    version = found["lmdb"].get("data_version", _DATA_VERSION)
    if version != _DATA_VERSION:
        problems.append(
            Problem(
                f"lmdb writes data version {version}, stores are of version {_DATA_VERSION}",
                f"pip install 'lmdb>={NEEDED['lmdb']}'",
            )
        )
    for name, use in _MORE.items():
        error = found[name].get("error")
        if error is not None and name == "matplotlib" and not _is_absent(error, name):
            cure = f"install it again, for {use}"
            problems.append(Problem(f"{name} cannot be imported: {error}", cure, serious=False))
    packages = {
        name: {"needed_for": _MORE.get(name, "everything"), **found[name]} for name in PACKAGES
    }
    for about in packages.values():
        for detail in ("cuda", "devices", "gpu_error", "kernels_error"):
            about.pop(detail, None)
    facts = {
        "tallstore": __version__,
        "python": platform.python_version(),
        "python_at": sys.executable,
        "packages": packages,
    }
    return Section(facts, tuple(problems))


def gpu(found: Mapping[str, Mapping[str, Any]]) -> Section:
    """CUDA devices, and whether Triton can work for them.

    Without a device Triton is for nothing, and nothing is wrong without it.
    """
    torch, triton = found["torch"], found["triton"]
    failed = triton.get("error") or ("error" not in torch and triton.get("kernels_error")) or None
    devices = torch.get("devices", [])
    compiler = os.environ.get("CC") or next(
        (name for name in ("gcc", "clang", "cc") if shutil.which(name)), None
    )
    driver = _driver()
    problems = []
    breaks = "load(device='cuda'), out= on a GPU and --device cuda are refused"
    if torch.get("gpu_error"):
        what = f"torch finds a GPU that does not work: {torch['gpu_error']}"
        problems.append(Problem(what, "look at nvidia-smi; everything works on the CPU"))
    elif driver is not None and not devices and "error" not in torch:
        why = "is built without CUDA" if torch.get("cuda") is None else "cannot use it"
        what = f"there is an NVIDIA driver, but torch {torch.get('version', '')} {why}; {breaks}"
        cure = "install a torch for the driver's CUDA, and set CUDA_VISIBLE_DEVICES right"
        problems.append(Problem(what, cure, serious=False))
    if devices and failed:
        cure = "pip install 'tallstore[gpu]'; everything works on the CPU"
        problems.append(Problem(f"no Triton ({failed}): {breaks}", cure))
    elif devices and _is_older(triton.get("version", ""), _TRITON):
        what = f"triton {triton['version']} is older than {_TRITON}"
        problems.append(Problem(what, "pip install 'tallstore[gpu]'"))
    if devices and compiler is None:
        what = f"no C compiler, which Triton needs to launch its kernels: {breaks}"
        problems.append(Problem(what, "install gcc or clang, or set CC"))
    facts = {
        "devices": devices,
        "driver": driver,
        "torch_cuda": torch.get("cuda"),
        "triton": triton.get("version"),
        "triton_error": failed,
        "compiler": compiler,
        "error": torch.get("gpu_error"),
        "without_triton": breaks if failed else None,
    }
    return Section(facts, tuple(problems))


def _driver() -> str | None:
    """The version of NVIDIA's driver, where one is loaded."""
    try:
        first = _DRIVER.read_text(errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)*\b", first)
    return found[0] if found else first
