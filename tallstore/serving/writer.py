"""Writing a task's weights into the model, and knowing what is there afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch.autograd.graph import increment_version

from tallstore.devices import on_device
from tallstore.errors import TallstoreError
from tallstore.serving.forms import CopyForm, Form, Job, Live
from tallstore.serving.planning import Plan
from tallstore.serving.reading import TaskCode
from tallstore.workers import Workers

__all__ = ["Writer"]


class Writer:
    """Writes weights in place, one task after the other.

    Parameters
    ----------
    device
        Where the model is.
    pool
        Threads to write with on the CPU.
    """

    def __init__(self, device: torch.device, pool: Workers) -> None:
        self._device = device
        self._pool = pool
        self._live = Live(threads=pool.count)
        self._used: Any = None

    def forget(self) -> None:
        """Nothing is known of what is in the model: the next task is written in full."""
        self._live.forget()

    def used(self) -> None:
        """What the calling thread queued with these weights ends before the next are written."""
        if self._device.type == "cuda":
            self._used = torch.cuda.current_stream(self._device).record_event()

    def write(self, code: TaskCode) -> int:
        """Write a task; it is there when this returns.

        Returns
        -------
        int
            Bytes of the device's memory that were read and written.

        Raises
        ------
        DeviceError
            The device failed; the message says that the model is no task now.
        """
        live = self._live
        try:
            # Also of models that were made in it; tensors that were not are as in no_grad.
            with torch.inference_mode(), on_device(self._device, "switching"):
                if self._device.type == "cpu":
                    moved = 0
                    # Views come last: they may be of weights that codes are put into.
                    soon: list[Form] = []
                    late: list[Form] = []
                    for form in code.forms:
                        (late if isinstance(form, CopyForm) and form.views else soon).append(form)
                    for forms in (soon, late):
                        if forms:
                            jobs = (job for form in forms for job in form.jobs(live))
                            moved += sum(self._pool.together(_run, jobs))
                    _copy(code)
                else:
                    moved = self._launch(code)
        except BaseException as exc:
            live.forget()
            _raise_partly(exc)
        finally:
            _tell_autograd(code.written)
        live.next()
        return moved

    def _launch(self, code: TaskCode) -> int:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._used is not None:
                stream.wait_event(self._used)
            moved = sum(job() for form in code.forms for job in form.jobs(self._live))
            _copy(code)
            stream.synchronize()
        return moved

    def decode(self, plan: Plan) -> int:
        """Decode a task from the store into the model, a piece at a time.

        Returns
        -------
        int
            Bytes written.

        Raises
        ------
        CorruptStoreError, DeviceError
            The message says that the model is no task now.
        """
        self._live.forget()
        targets = dict(plan.binding.targets)
        try:
            if self._used is not None:
                torch.cuda.current_stream(self._device).wait_event(self._used)
            with torch.inference_mode():
                plan.loader.load_into(targets, names=list(targets))
        except BaseException as exc:
            _raise_partly(exc)
        finally:
            _tell_autograd(plan.binding.written)
        return sum(tensor.nbytes for tensor in targets.values())


def _run(job: Job) -> int:
    with torch.inference_mode():
        return job()


def _copy(code: TaskCode) -> None:
    for one, other in code.copies:
        other.copy_(one)


def _tell_autograd(written: Iterable[torch.Tensor]) -> None:
    """Let graphs that hold on to these weights fail: their gradients would be wrong."""
    tensors = list(written)
    try:
        increment_version(tensors)
    except (RuntimeError, TypeError):  # as older ones of torch take them
        for tensor in tensors:
            increment_version(tensor)


def _raise_partly(exc: BaseException) -> NoReturn:
    """Raise the same failure, saying what the model is now."""
    if not isinstance(exc, TallstoreError):
        raise exc
    said = "the model is partly overwritten: no task is live until the next switch"
    raise type(exc)(f"{exc}; {said}") from exc
