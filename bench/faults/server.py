"""A process that has everything imported and the shim preloaded, and forks a child per request.

``python -m bench.faults.server`` reads one JSON object a line and answers with one. It has no
threads when it forks, and never opens a store itself.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Final

import torch

from bench.faults.checks import check
from bench.faults.operations import OPERATIONS
from bench.faults.shim import Shim
from bench.faults.template import make_template
from tallstore.engine import newfile, session
from tallstore.errors import TallstoreError

__all__ = ["main"]

#: Seconds after which a child counts as hanging.
_PATIENCE: Final = 120


def _kill_at_step(step: str, occurrence: int) -> None:
    """Have this process killed when a named step comes for the `occurrence`-th time."""
    left = [occurrence]

    def reached(name: str) -> None:
        if name == step:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # never: but no other thread gets further meanwhile

    session.WriteSession.step = lambda self, name: reached(name)  # type: ignore[method-assign]
    publish = newfile.NewFile.publish

    def wrapped(self: newfile.NewFile, *, timeout: float) -> None:
        reached("publish")
        publish(self, timeout=timeout)
        reached("published")

    newfile.NewFile.publish = wrapped  # type: ignore[method-assign]


def _child(request: dict[str, Any]) -> dict[str, Any]:
    place, name = Path(request["place"]), request["operation"]
    if request["do"] == "template":
        make_template(place)
        return {"modules": [name for name in sys.modules if name.startswith("tallstore.")]}
    if request["do"] == "check":
        template = Path(request["template"])
        return {"new": check(place, template, name, finished=request["finished"])}
    # A transaction each few chunks, as large stores have them.
    session._BATCH = 1 << 15  # type: ignore[misc]
    shim = Shim(os.environ["LD_PRELOAD"])
    if request.get("step"):
        _kill_at_step(request["step"], request.get("occurrence", 1))
    arm = request.get("arm", {})
    log = Path(arm.pop("log")) if "log" in arm else None
    shim.arm(place, log=log, **arm)
    started = time.perf_counter()
    try:
        OPERATIONS[name].run(place)
        shim.mark("done")
    except TallstoreError as exc:
        return {"refused": type(exc).__name__, "message": str(exc), "count": shim.count}
    finally:
        shim.disarm()
    return {"seconds": time.perf_counter() - started, "count": shim.count}


def _readable(descriptor: int) -> bool:
    """Wait for it, in ticks: while this process is stopped, none pass."""
    return any(select.select([descriptor], [], [], 1.0)[0] for _ in range(_PATIENCE))


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        status = 0
        os.close(reader)
        try:
            os.write(tell, b".")
            answer = _child(request)
        except BaseException as exc:
            answer = {"failed": f"{type(exc).__name__}: {exc}", "trace": traceback.format_exc()}
            status = 1
        os.write(writer, json.dumps(answer).encode())
        os._exit(status)
    os.close(writer)
    os.close(tell)
    try:
        if "delay" in request:
            os.read(ready, 1)
            time.sleep(request["delay"])
            os.kill(child, signal.SIGKILL)
        hanging = not _readable(reader)
        if hanging:
            os.kill(child, signal.SIGKILL)
        answer = b""
        while piece := os.read(reader, 1 << 16):
            answer += piece
        status = os.waitpid(child, 0)[1]
    finally:
        os.close(reader)
        os.close(ready)
    result: dict[str, Any] = {"exit": os.waitstatus_to_exitcode(status), "hanging": hanging}
    if answer and not os.WIFSIGNALED(status):
        result.update(json.loads(answer))
    return result


def main() -> None:
    """Answer until there are no more requests."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        answer = _serve(json.loads(line))
        # What the template needed, later children have: else they would mostly be killed importing.
        for module in answer.pop("modules", ()):
            importlib.import_module(module)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
