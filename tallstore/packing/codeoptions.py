"""What a caller may ask of codes, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tallstore.codes import MAX_STRIDE
from tallstore.errors import OptionError
from tallstore.fitting import DEFAULT_GAIN, GAINS

__all__ = ["CODE_NAMES", "MOST_BITS", "CodeOptions", "code_options"]

CODE_NAMES: Final = ("tall", "signs", "seeded", "levels", "auto")
#: What stands for a number that is not given.
_DENSITY: Final = {"signs": 0.05, "seeded": 0.1}
_BITS: Final = {"seeded": 4, "levels": 2}
#: Most bits of a value or a level.
MOST_BITS: Final = 4
#: What ``auto`` spends where nobody says how much.
_DEFAULT_BITS: Final = 0.15
_MAX_SEED: Final = 1 << 32
_MOST_STEPS: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeOptions:
    """How tasks are to be coded; made by `code_options`."""

    code: str = "tall"
    density: float | None = None
    """Share of the weights that are touched; of ``signs`` and ``seeded``."""
    bits: int | None = None
    """Bits of a seeded value, or of a dense level."""
    over: str = "none"
    """``shared``: levels are multiplied with the shared vector."""
    gain: str = DEFAULT_GAIN
    seed: int = 0
    bits_per_weight: float | None = None
    max_error: float | None = None
    keep: float | None = None
    """Share of the fine-tuned model's score; of ``auto``, with `evaluate`."""
    distil: int | None = None
    """Steps in which values are trained, with `calibrate`."""

    @property
    def stride(self) -> int:
        """One weight in so many has a seeded value."""
        if not self.density:
            return 0
        # Also of densities whose inverse no float holds.
        return max(1, round(min(1 / self.density, MAX_STRIDE)))

    @property
    def budget(self) -> float | None:
        """Bits a weight that codes may take; None where that is not how they are chosen."""
        if self.code != "auto" or self.max_error is not None:
            return None
        return _DEFAULT_BITS if self.bits_per_weight is None else self.bits_per_weight

    @property
    def shared(self) -> bool:
        """Whether codes are over a shared vector."""
        return self.code == "tall" or self.over == "shared"

    def record(self) -> dict[str, Any]:
        """What a task's record says of them."""
        given = {
            "density": self.density,
            "bits": self.bits,
            "over": self.over if self.code == "levels" else None,
            "gain": self.gain,
            # Not asked for where a share of the score is: then it is what was tried.
            "bits_per_weight": self.bits_per_weight if self.keep is None else None,
            "max_error": self.max_error,
            "keep": self.keep,
            "distil": self.distil,
        }
        return {name: value for name, value in given.items() if value is not None}


def code_options(*, evaluate: bool = False, calibrate: bool = False, **given: Any) -> CodeOptions:
    """Options as the caller gave them, checked and filled in.

    Parameters
    ----------
    evaluate
        Whether there is something to score a task with.
    calibrate
        Whether there is something to correct biases with.

    Raises
    ------
    OptionError
        One is out of range, or has no meaning for the code.
    """
    code = given.get("code", "tall")
    if code not in CODE_NAMES:
        raise OptionError(f"code={code!r}: it is one of {', '.join(CODE_NAMES)}")
    _check_meaning(code, given)
    found = CodeOptions(**{n: _plain(value) for n, value in given.items() if value is not None})
    _check_range("density", found.density, 0, 1)
    _check_range("bits_per_weight", found.bits_per_weight, 0, 16)
    _check_range("max_error", found.max_error, 0, math.inf)
    _check_range("keep", found.keep, 0, 1.5)
    if found.bits is not None and (type(found.bits) is not int or not 1 <= found.bits <= MOST_BITS):
        raise OptionError(f"bits={found.bits!r}: 1 to {MOST_BITS} are possible")
    if found.over not in ("none", "shared"):
        raise OptionError(f"over={found.over!r}: it is 'none' or 'shared'")
    if found.gain not in GAINS:
        raise OptionError(f"gain={found.gain!r}: it is one of {', '.join(GAINS)}")
    if type(found.seed) is not int or not 0 <= found.seed < _MAX_SEED:
        raise OptionError(f"seed={found.seed!r}: a whole number below 2**32 is needed")
    if found.keep is not None and not evaluate:
        raise OptionError(
            f"keep={found.keep}: it takes evaluate(task, state_dict), which scores a task's weights"
        )
    if found.distil is not None:
        if type(found.distil) is not int or not 1 <= found.distil <= _MOST_STEPS:
            raise OptionError(f"distil={found.distil!r}: a number of steps is needed, such as 100")
        if not calibrate:
            raise OptionError(
                f"distil={found.distil}: it takes calibrate(task) -> (module, batches), to train "
                "values with"
            )
    if calibrate and found.shared:
        raise OptionError(
            f"calibrate: code={code!r} is over a shared vector, and corrected biases are not "
            "multiples of it; code='auto', 'signs', 'seeded' and 'levels' with over='none' take it"
        )
    if calibrate and found.max_error is not None:
        raise OptionError(
            f"max_error={found.max_error}: with calibrate biases err on purpose, for the other "
            "weights; give bits_per_weight or keep"
        )
    density = found.density if found.density is not None else _DENSITY.get(code)
    bits = found.bits if found.bits is not None else _BITS.get(code)
    return CodeOptions(**{**_fields(found), "density": density, "bits": bits})


def _plain(value: Any) -> Any:
    """A number of numpy's as one of Python's, which records can hold."""
    return value.item() if isinstance(value, np.generic) else value


def _fields(options: CodeOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in CodeOptions.__slots__}


def _check_meaning(code: str, given: Mapping[str, Any]) -> None:
    takes = {
        "density": ("signs", "seeded"),
        "bits": ("seeded", "levels"),
        "over": ("levels",),
        "gain": ("signs", "seeded", "levels", "auto"),
        "bits_per_weight": ("auto",),
        "max_error": ("auto",),
        "keep": ("auto",),
        "distil": ("signs", "seeded", "levels", "auto"),
    }
    defaults = {"over": "none", "gain": DEFAULT_GAIN}
    for name, codes in takes.items():
        value = given.get(name)
        if value is not None and value != defaults.get(name) and code not in codes:
            raise OptionError(
                f"{name}={value!r}: code={code!r} takes none; it is for code {' or '.join(codes)}"
            )
    budgets = [n for n in ("bits_per_weight", "max_error", "keep") if given.get(n) is not None]
    if code == "auto" and len(budgets) > 1:
        raise OptionError(f"{' and '.join(budgets)}: give one of them")


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is None:
        return
    number = type(value) in (int, float) and math.isfinite(value)
    if not number or not low < value <= high:
        limit = f", at most {high:g}" if math.isfinite(high) else ""
        raise OptionError(f"{name}={value!r}: a number above {low:g}{limit} is needed")
