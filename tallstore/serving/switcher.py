"""A live model that is switched between the tasks of a store, in place."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any

import torch

from tallstore.devices import wanted_device
from tallstore.errors import StoreClosedError, UnknownTaskError
from tallstore.interrupts import Held
from tallstore.serving.binding import Private
from tallstore.serving.model import Model
from tallstore.serving.offer import Choice, listed
from tallstore.serving.opening import Opening, check_options, start
from tallstore.serving.planning import Plan
from tallstore.serving.results import Need, Residency, Source, Switch
from tallstore.serving.turns import Request, SharedTurn, Turns
from tallstore.serving.writer import Writer
from tallstore.store import StorePath, TallStore
from tallstore.workers import workers

__all__ = ["TaskSwitcher"]


class TaskSwitcher:
    """Switches a model between tasks, in place and in milliseconds.

    The base, and the shared vector if a task uses it, are kept on the model's device; each task's
    code there too, or in the host's memory, or in the store. After ``switch("math")`` the model's
    tensors are what ``tallstore.load(store, task="math")`` gives, bit for bit, in the storages that
    they have: CUDA graphs, compiled modules and optimizers go on with them. Safe to share between
    threads. On the CPU numba (``pip install 'tallstore[cpu]'``) makes switches several times
    faster.

    Between switches nobody else may change the weights: a switch writes only what differs from the
    task before. If they were changed, by training for one, ``switch(task, rewrite=True)`` writes
    all of them. A model whose tensors were replaced or moved is refused, until `refresh` takes it
    as it is now. Autograd knows of every switch: a graph made before it fails in ``backward()``, as
    after an optimizer's step, and gives no wrong gradients.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, compiled or not, or a dict of tensors by name, filled in place.
        Dtypes must be those of the store.
    store
        A store's path, or an open one; the switcher opens it for itself.
    device
        Where everything is done; it must be the model's. None: where the model is.
    resident
        ``"all"``: the codes of all tasks are on the device. ``"masks-on-host"``: they are in
        (pinned) memory of the host, and those used last on the device. ``"stream"``: they are read
        from the store, and those used last kept on the device.
    budget
        Bytes of codes on the device, beside base and shared vector. None: no limit where
        ``"all"``, else room for two: the live task's and the next. A task of which ``"stream"``
        keeps nothing, since its code is larger, is decoded straight into the model.
    tasks
        The tasks to serve; None: all that the store has.
    fidelity
        None: with the exact tier, for tasks that have it; ``"codes"``: by codes alone, for tasks
        that have codes. The exact weights of a task take as much memory as the model.
    private
        What to do where a task has a tensor of its own, such as a head, in another shape than the
        model: ``"replace"`` puts a parameter of that shape into the module, the same each time;
        ``"skip"`` leaves the model's.
    ignore
        Shell patterns of tensors to leave alone: those that only the store has, or only the model.
    external_base
        See `tallstore.open`.

    Raises
    ------
    MismatchError
        The model has other tensors, shapes or dtypes than a task, or is elsewhere, or some of its
        tensors share elements that the task has apart; nothing was written.
    UnknownTaskError, OptionError, StoreNotFoundError, NotAStoreError, CorruptStoreError
    DeviceError
        The device is not there, or too small; the message says how much each choice takes.

    Examples
    --------
    >>> switcher = TaskSwitcher(model, "zoo.tall")  # doctest: +SKIP
    >>> switcher.switch("math").ms  # doctest: +SKIP
    12.3
    >>> with switcher.use("code") as model:  # many threads may; each has it for itself
    ...     answer = model(question)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        store: StorePath | TallStore,
        *,
        device: torch.device | str | None = None,
        resident: Residency = "all",
        budget: int | None = None,
        tasks: Iterable[str] | None = None,
        fidelity: str | None = None,
        private: Private = "replace",
        ignore: Iterable[str] = (),
        external_base: StorePath | None = None,
    ) -> None:
        check_options(resident, budget, fidelity, private)
        self._wanted = None if device is None else wanted_device(device)
        self._model = Model(model, self._wanted)
        start(self._model.device)
        choice = Choice(
            tasks=listed(tasks), fidelity=fidelity, private=private, ignore=listed(ignore) or ()
        )
        opened = store if isinstance(store, TallStore) else None
        self._path = store.path if isinstance(store, TallStore) else store
        self.resident: Residency = resident
        self._turns = Turns()
        self._task: str | None = None
        self._closed = False
        self._process = os.getpid()
        self._ahead: ThreadPoolExecutor | None = None
        self._switching: ThreadPoolExecutor | None = None
        with ExitStack() as stack:
            self._pool = stack.enter_context(workers())
            self._opening = Opening(
                path=self._path,
                base_at=opened._base_at if opened is not None else external_base,
                choice=choice,
                resident=resident,
                budget=budget,
                pool=self._pool,
            )
            self._writer = Writer(self._model.device, self._pool)
            self._stock = self._opening.open(stack, self._model, self._writer)
            self._stack = stack.pop_all()

    # -- what there is --------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The model, as it was given."""
        return self._model.given

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that can be switched to."""
        return tuple(self._stock.offer.plans)

    @property
    def live(self) -> str | None:
        """The task that the model is; None before the first switch, or if one failed halfway."""
        return self._task

    @property
    def on_device(self) -> tuple[str, ...]:
        """The tasks whose codes are on the device, the one used last at the end."""
        return self._stock.codes.tasks

    def need(self) -> Need:
        """Bytes that serving takes beside the model, for each choice of `resident`."""
        return self._stock.need

    # -- switching ------------------------------------------------------------------------

    def switch(self, task: str, *, rewrite: bool = False) -> Switch:
        """Make the model a task.

        Waits until nobody else uses it. Everything is read and checked before the first weight is
        written: what fails then leaves the model as it is. Ctrl-C is heard while waiting, and when
        the switch has ended.

        Parameters
        ----------
        task
            One of `tasks`.
        rewrite
            Write every weight, whatever is there: needed if anything but the switcher changed
            weights in place, such as training.

        Returns
        -------
        Switch
            What was done.

        Raises
        ------
        UnknownTaskError
            There is no such task.
        MismatchError
            Tensors of the model were replaced or moved since it was bound; nothing was written, and
            `refresh` binds it anew.
        CorruptStoreError, DeviceError
            The message says if no task is live any more; else the one before is.
        OptionError
            Called inside `use`.
        """
        self._known(task)
        with Held() as held:
            request = self._turns.enter(task, held)
            try:
                return self._switch(task, rewrite=rewrite)
            finally:
                self._leave(request)

    @contextmanager
    def use(self, task: str) -> Iterator[Any]:
        """The model as a task, for nobody else, for the length of a block.

        Threads that ask for one task follow each other behind a single switch; nobody waits for
        ever. The weights are not to be kept: after the block they are another's. Nor are they to be
        changed: who did so says ``switch(task, rewrite=True)`` afterwards. Raises what `switch`
        does.

        Examples
        --------
        >>> with switcher.use("math") as model:  # doctest: +SKIP
        ...     logits = model(ids)
        """
        self._known(task)
        with self._turn(task):
            yield self.model

    @contextmanager
    def _turn(self, task: str | None) -> Iterator[None]:
        """The turn for the length of a block, the model being a task's, if one is named."""
        request = None
        try:
            with Held() as held:
                request = self._turns.enter(task, held)
                if task is not None:
                    self._switch(task)
            yield
        finally:
            if request is not None:
                with Held():
                    self._leave(request)

    async def aswitch(self, task: str, *, rewrite: bool = False) -> Switch:
        """`switch`, without blocking the event loop."""
        self._known(task)
        request = await self._turns.enter_async(task)
        return await self._in_thread(
            SharedTurn(lambda: self._leave(request), 1), task, rewrite=rewrite
        )

    @asynccontextmanager
    async def ause(self, task: str) -> AsyncIterator[Any]:
        """`use`, without blocking the event loop: ``async with switcher.ause("math") as model``."""
        self._known(task)
        request = await self._turns.enter_async(task)
        turn = SharedTurn(lambda: self._leave(request), 2)
        try:
            await self._in_thread(turn, task)
            yield self.model
        finally:
            turn.end()

    async def _in_thread(self, turn: SharedTurn, task: str, *, rewrite: bool = False) -> Switch:
        """Switch on a thread, which has a part in the turn until it is done."""
        if self._switching is None:
            self._switching = ThreadPoolExecutor(1, thread_name_prefix="tallstore-switch")
            self._stack.callback(self._switching.shutdown)
        try:
            work = self._switching.submit(self._switch, task, rewrite=rewrite)
        except BaseException:
            turn.end()
            raise
        work.add_done_callback(lambda _: turn.end())
        # Shielded, and no task: whatever is cancelled, the loop's end included, it goes on.
        return await asyncio.shield(asyncio.wrap_future(work))

    def prefetch(self, task: str) -> Future[None]:
        """Bring a task's code to the device, while the model is used.

        Returns
        -------
        Future
            Done when the code is there; its `result` raises what went wrong. Nobody has to wait.

        Raises
        ------
        UnknownTaskError
            There is no such task.
        """
        self._known(task)
        if self._ahead is None:
            self._ahead = ThreadPoolExecutor(1, thread_name_prefix="tallstore-prefetch")
            self._stack.callback(self._ahead.shutdown, cancel_futures=True)
        stock = self._stock

        def bring() -> None:
            if not stock.too_large(task):
                stock.take(task, ahead=True)

        return self._ahead.submit(bring)

    def _known(self, task: str) -> Plan:
        self._check_open()
        try:
            return self._stock.offer.plans[task]
        except (KeyError, TypeError):
            known = ", ".join(map(repr, self._stock.offer.plans))
            raise UnknownTaskError(
                f"{self._path}: no task {task!r} is served; there are: {known}. One that was added "
                "to the store later is there after refresh()"
            ) from None

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("this switcher was closed; make another")
        if self._process != os.getpid():
            raise StoreClosedError(
                "this switcher was made before the process forked, and its threads are not here; "
                "make another"
            )

    def _leave(self, request: Request) -> None:
        self._writer.used()
        self._turns.leave(request)

    def _switch(self, task: str, *, rewrite: bool = False) -> Switch:
        """Make the model a task; the caller has the turn."""
        began = time.perf_counter()
        plan, before = self._known(task), self._task
        self._model.check_places()
        source: Source = "live"
        moved = loaded = 0
        replaced: tuple[str, ...] = ()
        if before != task or rewrite:
            if rewrite or before is None:
                self._writer.forget()
            if self._stock.too_large(task):
                self._stock.offer.reader.check(plan)
                self._begin(None)
                source, loaded, moved = "store", plan.nbytes, self._writer.decode(plan)
            else:
                taken = self._stock.take(task)
                self._begin(task)
                source, loaded = taken.source, taken.loaded
                moved = self._writer.write(taken.code)
            replaced = self._model.install(plan.binding.heads)
            self._task = self._stock.codes.live = task
        return Switch(
            task=task,
            previous=before,
            source=source,
            moved=moved,
            loaded=loaded,
            ms=(time.perf_counter() - began) * 1e3,
            replaced=replaced,
            skipped=plan.binding.skipped,
        )

    def _begin(self, task: str | None) -> None:
        """From the first write on, until the last, no task is live; the code of one is in use."""
        self._task, self._stock.codes.live = None, task

    # -- the store ------------------------------------------------------------------------

    def refresh(self) -> None:
        """Serve what is in the store now, into the model as it is now.

        Of the store, tasks that were added, or another store in its place: until then the switcher
        shows it as it was. Of the model, tensors that were replaced or moved: until then no switch
        goes on; afterwards no task is live. Waits until nobody uses the model. What did not change
        is not read again. If it fails, everything that is in memory is served as before; and what
        is not, unless another file took the place of the store's.

        Raises
        ------
        MismatchError
            What is there now does not fit the model.
        OptionError
            What is there now does not fit the budget, or there are no tasks any more. The message
            says what would fit: another switcher, made with it, serves that.
        UnknownTaskError, CorruptStoreError, StoreNotFoundError, DeviceError
        """
        self._check_open()
        with self._turn(None):
            self._check_open()
            with ExitStack() as stack, self._as_it_is() as model:
                writer = self._writer
                if model.device != self._model.device:
                    writer = Writer(model.device, self._pool)
                stock = self._opening.open(stack, model, writer, self._stock)
                self._stack.push(stack.pop_all())
            older, self._stock = self._stock, stock
            self._model, self._writer = model, writer
            if self._task not in stock.same:
                # The model is what the task was; switching to it writes what it is now.
                self._task = None
                writer.forget()
            older.offer.store.close()

    @contextmanager
    def _as_it_is(self) -> Iterator[Model]:
        """The model, bound anew where it changed."""
        if self._model.is_current():
            yield self._model
            return
        with self._model.renewed(self._wanted) as model:
            start(model.device)
            yield model

    def close(self) -> None:
        """Give everything back but the model, which stays what it is."""
        if self._closed:
            return
        with self._turn(None):
            if self._closed:
                return
            self._closed = True
            self._stock.clear()
        self._stack.close()

    def __enter__(self) -> TaskSwitcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.tasks)} tasks, live: {self._task!r}"
        return f"<TaskSwitcher {str(self._path)!r} on {self._model.device}, {state}>"
