"""Options that say how tasks are coded, for the commands that code them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from tallstore.errors import OptionError

__all__ = ["CODES", "coding_options", "coding_values", "find_function"]

#: `tallstore.packing.codeoptions.CODE_NAMES`, without its imports; a test compares them.
CODES: Final = ("tall", "signs", "seeded", "levels", "auto")

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _share(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A share: ``0.995`` or ``99.5%``; a callback."""
    if value is None:
        return None
    text = value.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no share; give one like 99.5% or 0.995", ctx=ctx, param=param
        ) from None


def coding_options(*, extra: tuple[str, ...] = ()) -> Callable[[_Function], _Function]:
    """``--code``, with `extra` choices beside `CODES`, and its options."""
    every = {
        "density": click.option(
            "--density",
            callback=_share,
            metavar="SHARE",
            help="signs, seeded: share of the weights touched.  [default: 5%, 10%]",
        ),
        "bits": click.option(
            "--bits",
            type=click.IntRange(1, 4),
            help="seeded, levels: bits of a value.  [default: 4, 2]",
        ),
        "over": click.option(
            "--over",
            type=click.Choice(["none", "shared"]),
            default="none",
            show_default=True,
            help="levels: of the weights themselves, or times a shared profile of magnitudes.",
        ),
        "gain": click.option(
            "--gain",
            type=click.Choice(["unbiased", "norm", "ls"]),
            default="unbiased",
            show_default=True,
            help="Length of a coded task vector: same projection, same norm, or least squares.",
        ),
        "seed": click.option(
            "--seed", type=click.IntRange(0), default=0, help="seeded: of the hash that picks."
        ),
        "bits_per_weight": click.option(
            "--bits-per-weight",
            type=float,
            metavar="BITS",
            help="auto: what codes may take.  [default: 0.15]",
        ),
        "max_error": click.option(
            "--max-error", type=float, metavar="NUMBER", help="auto: relative error at most."
        ),
        "keep": click.option(
            "--keep",
            callback=_share,
            metavar="SHARE",
            help="auto: share of the fine-tuned model's score to keep; needs --evaluate.",
        ),
        "evaluate": click.option(
            "--evaluate",
            metavar="MODULE:FUNCTION",
            help="Your function(task, state_dict) -> score, higher is better; it is run.",
        ),
        "calibrate": click.option(
            "--calibrate",
            metavar="MODULE:FUNCTION",
            help="Your function(task) -> (module, batches), inputs without labels: biases are "
            "coded so that the module gives on average what the original gives.",
        ),
        "distil": click.option(
            "--distil",
            type=click.IntRange(1),
            metavar="STEPS",
            help="Train coded values for so many steps, such as 100, on what --calibrate gives.",
        ),
    }

    def add(function: _Function) -> _Function:
        for option in reversed(every.values()):
            function = option(function)
        return click.option(
            "--code",
            type=click.Choice([*CODES, *extra]),
            help="How task vectors are coded: masks over the shared vector (tall), signs of the "
            "largest weights, values on seeded weights, levels for all, or what errs least for "
            "the bits (auto).",
        )(function)

    return add


def coding_values(given: dict[str, Any]) -> dict[str, Any]:
    """Take what `coding_options` gave out of a command's arguments: keyword arguments."""
    names = (
        "density", "bits", "over", "gain", "seed", "bits_per_weight", "max_error", "keep", "distil"
    )  # fmt: skip
    found = {name: given.pop(name) for name in names if name in given}
    for name in ("evaluate", "calibrate"):
        if name in given:
            text = given.pop(name)
            found[name] = None if text is None else find_function(f"--{name}", text)
    return found


def find_function(option: str, text: str) -> Callable[..., Any]:
    """The function called ``MODULE:FUNCTION``; modules in the working directory are found.

    Raises
    ------
    OptionError
        There is none.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise OptionError(f"{option} {text}: give MODULE:FUNCTION, such as scores:accuracy")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as exc:
        raise OptionError(f"{option} {text}: {type(exc).__name__}: {exc}") from exc
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise OptionError(f"{option} {text}: it is {type(found).__name__}, no function")
    function: Callable[..., Any] = found
    return function
