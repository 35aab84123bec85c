"""Everything that is read of one generation of a store: plans of its tasks, and what they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tallstore import compiling
from tallstore.errors import OptionError
from tallstore.loading import Loader
from tallstore.serving.binding import Private, bind
from tallstore.serving.model import Model
from tallstore.serving.planning import Plan, plan
from tallstore.serving.reading import Reader
from tallstore.serving.resident import Resident
from tallstore.serving.results import Need
from tallstore.store import TallStore
from tallstore.workers import Workers

__all__ = ["Choice", "Offer", "listed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is served, and how."""

    tasks: tuple[str, ...] | None
    fidelity: str | None
    private: Private
    ignore: tuple[str, ...]


class Offer:
    """The tasks of an open store, planned for a model.

    Parameters
    ----------
    store
        Closed with the offer.

    Raises
    ------
    UnknownTaskError
        A task that is to be served is not there.
    MismatchError
        A task does not fit the model.
    OptionError
        There are no tasks.
    """

    def __init__(self, store: TallStore, model: Model, choice: Choice, pool: Workers) -> None:
        self.store = store
        self.model = model
        #: What tells whether another generation shares the base, and everything else.
        self.base = store.base.identity
        self.file = (store._held().manifest.store, store.vector)
        names = tuple(store.tasks) if choice.tasks is None else choice.tasks
        if not names:
            raise OptionError(f"{store.path}: there are no tasks to serve; tallstore add adds some")
        self.records = {name: store._task(name) for name in names}
        self.plans = {name: self._plan(name, model, choice) for name in names}
        self.resident = Resident(store._held(), store._catalog, model.device, pool)
        self.reader = Reader(self.resident, pool)

    def locate(self, budget: int | None) -> None:
        """On the CPU, keep seeded values with their places, where all codes fit so.

        To work the places out takes a switch longer than all the rest. They fit where they take no
        more than the base, so that model, base and codes take three times the model at the most.

        Parameters
        ----------
        budget
            That they have to fit in too; None: there is none.
        """
        if self.model.device.type != "cpu":
            return
        otherwise = self.need()
        room = otherwise.base if budget is None else min(otherwise.base, budget)
        self._keep_places(True)
        if self.need().codes > max(room, otherwise.codes):
            self._keep_places(False)

    def _keep_places(self, located: bool) -> None:
        for made in self.plans.values():
            made.located = located

    def _plan(self, name: str, model: Model, choice: Choice) -> Plan:
        fidelity = choice.fidelity
        if fidelity == "codes" and self.records[name].code == "none":
            fidelity = None  # it has no codes: its base alone would be another model
        loader = Loader(self.store._held(), self.store._catalog, task=name, fidelity=fidelity)
        if loader.task is None:
            raise OptionError(f"{loader.what}: no task")
        made = bind(
            loader.what,
            loader.task,
            model,
            base=loader.base.contents,
            private=choice.private,
            ignore=choice.ignore,
        )
        return plan(loader, made, exact=fidelity != "codes")

    @property
    def places(self) -> frozenset[str]:
        """Names of the model's tensors that some task writes."""
        return frozenset(name for made in self.plans.values() for name in made.binding.places)

    @property
    def arenas(self) -> tuple[frozenset[int], frozenset[int]]:
        """Arenas of the base that are needed, and those of the shared vector."""
        base = frozenset(arena for made in self.plans.values() for arena in made.arenas)
        vector = frozenset(arena for made in self.plans.values() for arena in made.vectors)
        return base, vector

    def need(self) -> Need:
        """Bytes that serving takes."""
        base, vector = self.arenas
        plans = self.plans.values()
        keeps = self.model.device.type == "cpu" and compiling.loaded()
        return Need(
            base=sum(map(self.resident.base_bytes, base)),
            vector=sum(map(self.resident.vector_bytes, vector)),
            codes=sum(made.nbytes for made in plans),
            largest=max(made.nbytes for made in plans),
            staged=max(made.nbytes - made.exact_bytes for made in plans),
            under=2 * max(made.under for made in plans) if keeps else 0,
        )

    def load_shared(self) -> None:
        """Read the base and the shared vector, as far as they are needed."""
        base, vector = self.arenas
        for arena in sorted(base):
            self.resident.base(arena)
        for arena in sorted(vector):
            self.resident.vector(arena)

    def inherit(self, older: Offer) -> tuple[str, ...]:
        """Take over what is the same in another generation; returns the tasks that are."""
        if self.base != older.base or self.model.device != older.model.device:
            return ()
        same = self.file == older.file
        self.resident.inherit(older.resident, vector=same)
        # Codes are made for the tensors that they go to.
        if not same or self.model is not older.model:
            return ()
        return tuple(n for n, record in self.records.items() if older.records.get(n) == record)


def listed(names: Iterable[str] | str | None) -> tuple[str, ...] | None:
    """Names out of one, or of several."""
    if names is None:
        return None
    found: Sequence[str] = [names] if isinstance(names, str) else list(names)
    if not all(isinstance(name, str) for name in found):
        raise OptionError(f"{names!r}: names are text")
    return tuple(dict.fromkeys(found))
