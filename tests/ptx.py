"""Compiles kernels for GPUs that are not here, in a child, and reads what came out.

The test process itself holds kernels that Triton interprets; compiling takes a process in which
they are the real thing. Run as a script it is that child: cases in on stdin, results on stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CUDA", "Case", "Compiled", "compile_cases"]

#: A100, H100 and H200, B200.
CUDA = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel with the types of its arguments."""

    module: str
    """Such as ``"tallstore.kernels.reconstruct"``."""
    kernel: str
    types: Mapping[str, str]
    """Triton's names, such as ``"*bf16"`` or ``"i64"``; pointers and integers count as divisible
    by 16, unless named in `odd` or never specialized."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Values of constexprs, and None for absent pointers; ``"tl.bfloat16"`` stands for a dtype."""
    warps: int = 4
    odd: Sequence[str] = ()
    targets: Sequence[str] = CUDA


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel for one target."""

    target: str
    text: str
    """PTX, or AMD's assembly."""
    spills: int
    """Bytes of registers spilled; -1 where nothing tells."""

    def count(self, pattern: str) -> int:
        """How many instructions start with a regular expression."""
        return len(re.findall(rf"^\s*(?:@!?%p\d+\s+)?{pattern}", self.text, re.MULTILINE))

    def operations(self) -> Counter[str]:
        """Every opcode that touches global memory or floats, and how often it stands there."""
        found = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", self.text, re.MULTILINE)
        return Counter(found)


def compile_cases(cases: Sequence[Case]) -> list[list[Compiled]]:
    """For each case, the result for each of its targets."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(case) for case in cases]),
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.rpartition("\n@@")[2])
    return [[Compiled(**one) for one in case] for case in found]


def _spills(ptx: str, arch: str) -> int:
    from triton.backends.nvidia import compiler

    number = int(arch.removeprefix("sm_"))
    program = compiler.get_ptxas(number).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = re.search(r"\.target (\w+)", ptx)
        assert name is not None
        command = [program, "-v", f"--gpu-name={name[1]}", str(source), "-o", f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    assert "spill stores" in said, said
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))


def _compile(case: dict[str, Any], target: str) -> dict[str, Any]:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(case["module"]), case["kernel"])
    constants = {
        name: getattr(tl, value[3:]) if str(value).startswith("tl.") else value
        for name, value in case["constants"].items()
    }
    signature = {
        name: "constexpr" if name in constants else case["types"][name] for name in kernel.arg_names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind[0] in "*iu" and name not in (*case["odd"], *kernel.do_not_specialize)
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    cuda = target.startswith("sm_")
    where = (
        GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        if cuda
        else GPUTarget("hip", target, 64)
    )
    options = {"num_warps": case["warps"], "enable_fp_fusion": False}
    built = triton.compile(source, target=where, options=options)
    text = built.asm["ptx" if cuda else "amdgcn"]
    spills = _spills(text, target) if cuda else -1
    return asdict(Compiled(target=target, text=text, spills=spills))


if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    results = [[_compile(case, target) for target in case["targets"]] for case in asked]
    print("\n@@" + json.dumps(results))
