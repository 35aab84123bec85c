"""Looking at packages in processes of their own, all at once.

A package may fail to import, end the process (built for another processor), hang, or, as CUDA does,
leave behind what its process never gets rid of. None of that happens here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["probe"]

#: Seconds for the slowest: torch from a cold network drive.
_PATIENCE: Final = 180.0

_BEGIN: Final = """
import importlib, importlib.metadata, json, sys
sys.path[:] = json.loads(sys.argv[1])
module = importlib.import_module(sys.argv[2])
version = getattr(module, "__version__", None)
if not isinstance(version, str):
    try:
        version = importlib.metadata.version(sys.argv[2])
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
found = {"version": version}
"""
_END: Final = """
print("\\n" + json.dumps(found))
"""

#: What is asked of a package beside its version.
_QUESTIONS: Final[Mapping[str, str]] = {
    # Which data format the library inside writes, seen in what it writes.
    "lmdb": """
import os, tempfile
found["library"] = ".".join(map(str, module.version()))
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "probe")
    options = dict(subdir=False, map_size=1 << 20)
    try:
        environment = module.Environment(path, lib_version=0, **options)
    except TypeError:
        environment = module.Environment(path, **options)
    environment.close()
    with open(path, "rb") as file:
        head = file.read(24)
    found["data_version"] = int.from_bytes(head[20:24], sys.byteorder)
""",
    "torch": """
found["cuda"] = module.version.cuda
found["devices"] = []
found["gpu_error"] = None
try:
    for number in range(module.cuda.device_count() if module.cuda.is_available() else 0):
        about = module.cuda.get_device_properties(number)
        free, total = module.cuda.mem_get_info(number)
        found["devices"].append({
            "name": about.name,
            "capability": f"{about.major}.{about.minor}",
            "memory_bytes": total,
            "free_bytes": free,
        })
except Exception as exc:
    found["gpu_error"] = f"{type(exc).__name__}: {exc}"
""",
    "triton": """
found["kernels_error"] = None
try:
    importlib.import_module("tallstore.kernels.common")
except Exception as exc:
    found["kernels_error"] = f"{type(exc).__name__}: {exc}"
""",
}


def probe(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What each package says of itself.

    Parameters
    ----------
    names
        Of packages, as they are imported.

    Returns
    -------
    dict
        By name; ``"version"`` and more where it can be imported, else ``"error"``, one line.
    """
    running = {name: _start(name) for name in names}
    return {name: _answer(process) for name, process in running.items()}


def _start(name: str) -> subprocess.Popen[str]:
    code = _BEGIN + _QUESTIONS.get(name, "") + _END
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, json.dumps(sys.path), name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"no answer within {_PATIENCE:.0f} s"}
    if process.returncode < 0:
        return {"error": f"importing it ended the process with signal {-process.returncode}"}
    try:
        found = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        found = None
    if process.returncode or not isinstance(found, dict):
        lines = err.strip().splitlines() or [f"exit status {process.returncode}"]
        return {"error": lines[-1].strip()}
    return found
