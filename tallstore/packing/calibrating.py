"""What a task's module gives on a few inputs, and the biases with which its codes give it too.

A code errs on every weight a little. Over the inputs of a layer, which are mostly of one sign
behind a rectifier, the errors of a row add up to a constant: its output is off by so much for every
input, and the layers behind it hear that, not the noise around it. The layer's bias can take it
back: whatever it is off by, on average over a few inputs that need no labels, is subtracted from
it (bias correction: Nagel et al., arXiv 1906.04721, section 4.2).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from tallstore.errors import OptionError, TallstoreError
from tallstore.matching import common_prefix, renamed
from tallstore.packing.divergence import distance, divergence, is_logits, softening
from tallstore.wording import error_words

__all__ = ["Calibrate", "Calibration"]

#: ``calibrate(task) -> (module, batches)``.
Calibrate = Callable[[str], tuple[nn.Module, Iterable[Any]]]

#: Modules whose outputs have their channels last, as their biases are added.
_LAST: Final = (nn.Linear, nn.LayerNorm)
#: And before so many axes of places.
_PLACES: Final = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)


class Calibration:
    """A task's module and inputs, and what the original weights make of them.

    Parameters
    ----------
    calibrate
        The caller's: gives a module of the task's shape, and what it is called with, a batch after
        the other: a tensor, a tuple of arguments, or a mapping of them by name. The module's
        weights are others while it is called, and what they were afterwards: they may be those of
        a checkpoint that is being packed.
    original
        The task's weights, as a state dict.

    Raises
    ------
    OptionError
        `calibrate` failed or gave something else, the weights do not fit its module, the module
        fails on a batch, or gives numbers that are not finite.
    """

    def __init__(self, task: str, calibrate: Calibrate, original: Any) -> None:
        self._task = task
        self._module, self._batches = self._ask(calibrate)
        if not isinstance(original, Mapping) or not all(isinstance(name, str) for name in original):
            raise self._refused(
                f"the checkpoint is no state dict, of tensors by their names, but {_what(original)}"
            )
        self._found = dict(_biased(self._module))
        with self._in_words("the module has no state dict"):
            own = self._module.state_dict().keys()
        #: To take off a task's names, and to put on, for the module's: "model.", for one.
        self._prefix = common_prefix(list(original), own)
        self._means: dict[str, list[Tensor]] = defaultdict(list)

        def keep(name: str, output: Tensor, axis: int) -> None:
            self._means[name].append(_mean(output, axis))

        with self._hooked(self._found, keep):
            self._wanted = self._run(original, "the original")
        if not all(bool(mean.isfinite().all()) for means in self._means.values() for mean in means):
            raise self._refused("the original weights give numbers that are not finite")

    @property
    def names(self) -> tuple[str, ...]:
        """The biases that were added to an output, as the task names them."""
        return tuple(map(self._name, self._means))

    def _name(self, module: str) -> str:
        """Of a submodule's bias, as the task has it."""
        off, on = self._prefix
        return renamed(f"{module}.bias".removeprefix("."), (on, off))

    def corrected(self, coded: Any, names: Iterable[str]) -> tuple[dict[str, Tensor], float]:
        """The biases with which coded weights give the means of the original, front to back.

        Parameters
        ----------
        coded
            A state dict.
        names
            Of `names`, those that may be changed.

        Returns
        -------
        dict
            Biases by name, float32.
        float
            How far what the module gives with them is from what the original gives: the KL
            divergence, if that is logits.

        Raises
        ------
        OptionError
            The module fails, or does not do with these weights what it did with the others.
        """
        wanted = set(names)
        shifts: dict[str, list[Tensor]] = defaultdict(list)

        def shift(name: str, output: Tensor, axis: int) -> Tensor:
            done = shifts[name]
            if len(done) == len(self._means[name]):
                raise self._refused(f"{name!r} is called more often than with the original weights")
            by = self._means[name][len(done)] - _mean(output, axis)
            done.append(by)
            shape = [1] * output.dim()
            shape[axis] = -1
            return output + by.view(shape).to(output.dtype)

        some = [name for name in self._found if self._name(name) in wanted]
        with self._hooked(some, shift):
            given = self._run(coded, "the codes")
        found = {}
        for name, by in shifts.items():
            key = self._name(name)
            found[key] = coded[key].detach().float() + torch.stack(by).mean(0).to(coded[key].device)
            if not bool(found[key].isfinite().all()):
                raise self._refused(f"the codes give numbers that are not finite, at {name!r}")
        return found, distance(given, self._wanted)

    def distance(self, coded: Any) -> float:
        """How far what the module gives with some weights is from what the original gives.

        Raises
        ------
        OptionError
            The module fails.
        """
        return distance(self._run(coded, "the codes"), self._wanted)

    # -- to train with ----------------------------------------------------------------------

    @property
    def batches(self) -> int:
        """How many there are."""
        return len(self._batches)

    def trains(self, name: str) -> bool:
        """Whether a tensor of the task's is a parameter of the module: buffers are as they are."""
        own = renamed(name, self._prefix)
        return any(own == n for n, _ in self._module.named_parameters(remove_duplicate=False))

    @cached_property
    def temperature(self) -> float:
        """What logits are softened by to train with them."""
        return softening([one for batch in self._wanted for one in batch])

    def loss(self, state: Mapping[str, Tensor], batch: int) -> Tensor:
        """How far a batch of a state that may need gradients is off, by item; not checked.

        As `distance` has it, but for logits' `temperature`.
        """
        module, given = self._module, self._batches[batch]
        there, trained = _weights(module), dict(module.named_parameters(remove_duplicate=False))
        # Of those that the module ties the last is taken, as a state dict is loaded.
        given_by: dict[int, Tensor] = {}
        for name, tensor in state.items():
            own = renamed(name, self._prefix)
            if own in there:
                # Buffers the module may write to.
                given_by[id(there[own])] = tensor.to(there[own], copy=own not in trained)
        arguments, words = _arguments(given)
        arguments = tuple(map(_trainable, arguments))
        words = {name: _trainable(value) for name, value in words.items()}
        # Each place by one name: by two, what it held is lost when the call puts it back.
        weights = {n: given_by[id(t)] for n, t in _held(module) if id(t) in given_by}
        output = functional_call(module, weights, arguments, words, tie_weights=False)
        found = list(_tensors(output))
        wanted = list(map(_trainable, self._wanted[batch]))
        if [one.shape for one in found] != [one.shape for one in wanted]:
            raise self._refused("the module gives other shapes than with the original weights")
        items = sum(one.numel() // (one.shape[-1] if is_logits(one) else 1) for one in wanted)
        each = [divergence(*pair, self.temperature) for pair in zip(found, wanted, strict=True)]
        total = torch.stack(each).sum()
        return total / float(max(items, 1))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The module as it is when it is used, and as it was afterwards."""
        module = self._module
        # Some count their calls, keep what they were given, or hold other tensors afterwards.
        parts = [
            (part, part.training, dict(part._parameters), dict(part._buffers))
            for part in module.modules()
        ]
        # Outside inference mode none can be written to that was made in it.
        inside = torch.is_inference_mode_enabled()
        kept = [
            (tensor, tensor.detach().clone())
            for tensor in (*module.parameters(), *module.buffers())
            if inside or not tensor.is_inference()
        ]
        module.eval()
        try:
            yield
        finally:
            for part, training, parameters, buffers in parts:
                part.training = training
                if not isinstance(part, torch.jit.ScriptModule):  # whose are fixed
                    part._parameters.clear()
                    part._parameters.update(parameters)
                    part._buffers.clear()
                    part._buffers.update(buffers)
            with torch.no_grad():
                for tensor, was in kept:
                    tensor.copy_(was)

    @contextmanager
    def _in_words(self, what: str) -> Iterator[None]:
        """Whatever the caller's module raises, as a refusal."""
        try:
            yield
        except TallstoreError:
            raise
        except Exception as exc:
            raise self._refused(f"{what}: {error_words(exc)}") from exc

    def _ask(self, calibrate: Calibrate) -> tuple[nn.Module, list[Any]]:
        with self._in_words("it failed"):
            answer = calibrate(self._task)
            if not isinstance(answer, (tuple, list)) or len(answer) != 2:
                raise self._refused(
                    f"it gave {type(answer).__name__}; a torch.nn.Module and batches are needed"
                )
            module, given = answer[0], list(answer[1])
        if not isinstance(module, nn.Module) or not given:
            raise self._refused(
                f"it gave {type(module).__name__} and {len(given)} batches; a torch.nn.Module and "
                "at least one batch are needed"
            )
        for name, tensor in _weights(module).items():
            if is_lazy(tensor) or tensor.is_meta:
                raise self._refused(
                    f"{name!r} of the module has no numbers yet: call a lazy module once, and make "
                    "one on the meta device real (to_empty)"
                )
        return module, given

    def _run(self, state: Any, what: str) -> list[list[Tensor]]:
        """What the module, as `state` has it, gives for every batch."""
        module = self._module
        with self._in_words(f"the module failed with {what}"), self.evaluating():
            named = {renamed(name, self._prefix): tensor for name, tensor in state.items()}
            missing = _missing(module, module.load_state_dict(named, strict=False).missing_keys)
            if missing:
                raise self._refused(f"the task has no {missing[0]!r}, which the module has")
            with torch.no_grad():
                return [self._outputs(batch) for batch in self._batches]

    def _outputs(self, batch: Any) -> list[Tensor]:
        given = _call(self._module, batch)
        found = [tensor.detach().clone() for tensor in _tensors(given)]
        if not found:
            raise self._refused(
                f"the module gives {_what(given)} without floating-point numbers; a tensor "
                "of them is needed, or a mapping, tuple, list or dataclass of some"
            )
        if not any(tensor.numel() for tensor in found):
            raise self._refused("the module gives nothing for a batch: is the batch empty?")
        return found

    @contextmanager
    def _hooked(
        self, modules: Iterable[str], tell: Callable[[str, Tensor, int], Tensor | None]
    ) -> Iterator[None]:
        """Be told what modules give; what comes back takes the place of it."""

        def hook(name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
            def told(module: nn.Module, _: Any, output: Any) -> Tensor | None:
                # Some give their bias beside what it is to be added to.
                plain = isinstance(output, Tensor)
                return tell(name, output, self._found[name](output)) if plain else None

            return told

        handles = [self._module.get_submodule(n).register_forward_hook(hook(n)) for n in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _refused(self, why: str) -> OptionError:
        return OptionError(f"calibrate({self._task!r}): {why}")


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are tied by all of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each by all places that hold it, and a place by one name."""
    for prefix, part in module.named_modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}".removeprefix("."), tensor


def _what(given: Any) -> str:
    """What something is, for messages."""
    return "None" if given is None else f"a {type(given).__name__}"


def _missing(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Of the names that were not loaded those that count.

    Weights may be tied to others that were; and whole numbers, such as positions, are made by the
    module itself, if a checkpoint has none.
    """
    found = _weights(module)
    lost = set(names)
    loaded = {id(tensor) for name, tensor in found.items() if name not in lost}
    return [
        name
        for name in names
        if name not in found or (found[name].is_floating_point() and id(found[name]) not in loaded)
    ]


def _call(module: nn.Module, batch: Any) -> Any:
    arguments, words = _arguments(batch)
    return module(*arguments, **words)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def _trainable(value: Any) -> Any:
    """What takes part in training, also where it was made in inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _tensors(output: Any) -> Iterator[Tensor]:
    """The numbers that a module gives, in whatever they are; float32."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield (output if output.layout == torch.strided else output.to_dense()).float()
    elif isinstance(output, Mapping):
        yield from (found for part in output.values() for found in _tensors(part))
    elif isinstance(output, (tuple, list)):
        yield from (found for part in output for found in _tensors(part))
    elif is_dataclass(output) and not isinstance(output, type):
        yield from _tensors([getattr(output, field.name) for field in fields(output)])


def _biased(module: nn.Module) -> Iterator[tuple[str, Callable[[Tensor], int]]]:
    """Submodules that add a bias to what they give last, and where the channels of that are."""
    parts = list(module.named_modules())
    # One that several layers add cannot be right for all.
    uses = Counter(id(getattr(part, "bias", None)) for _, part in parts)
    for name, part in parts:
        bias = getattr(part, "bias", None)
        if not isinstance(bias, nn.Parameter) or bias.dim() != 1 or uses[id(bias)] > 1:
            continue
        if isinstance(part, _LAST):
            yield name, lambda output: output.dim() - 1
        elif isinstance(part, _NORMS):
            yield name, lambda _: 1
        else:
            places = next((n for kind, n in _PLACES.items() if isinstance(part, kind)), None)
            if places is not None:
                yield name, lambda output, places=places: output.dim() - 1 - places  # type: ignore[misc]


def _mean(output: Tensor, axis: int) -> Tensor:
    """By channel, in float32."""
    others = [n for n in range(output.dim()) if n != axis]
    found = output.detach().float()
    return found.mean(others) if others else found
