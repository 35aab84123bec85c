"""From what a task's tensors did to how each is going to be coded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tallstore.codes import PLANES, SEEDED, SPARSE
from tallstore.errors import OptionError
from tallstore.fitting import Magnitudes, fit_magnitudes
from tallstore.packing.codeoptions import CodeOptions
from tallstore.packing.drafts import Draft

__all__ = ["Survey", "dense_draft", "fixed_drafts", "seeded_draft", "sparse_draft"]

#: Gives the histograms of the weights that a seed picks, one in so many of some segments.
Survey = Callable[[Mapping[int, int]], Mapping[int, Magnitudes]]


def sparse_draft(segment: int, found: Magnitudes, density: float) -> Draft:
    """Signs of the largest `density` of a tensor's weights."""
    return Draft(segment, SPARSE, cut=found.cut(density))


def dense_draft(segment: int, found: Magnitudes, bits: int) -> Draft | None:
    """Levels fitted to all of a tensor's weights; None where there is nothing to fit to."""
    magnitudes = fit_magnitudes(found, 1 << (bits - 1))
    return Draft(segment, PLANES, magnitudes, bits) if magnitudes else None


def seeded_draft(segment: int, values: Magnitudes, bits: int, stride: int) -> Draft | None:
    """Levels fitted to the weights that a seed picks; None where none of them moved."""
    # 16 codes and none make 17, of which four planes hold 16: so 7 magnitudes, not 8.
    count = min(1 << (bits - 1), 7)
    magnitudes = fit_magnitudes(values, count)
    return Draft(segment, SEEDED, magnitudes, bits, stride=stride) if magnitudes else None


def moving(found: Mapping[int, Magnitudes]) -> dict[int, Magnitudes]:
    """The tensors that moved, by finite distances."""
    return {n: seen for n, seen in found.items() if not seen.same and seen.finite}


def fixed_drafts(
    options: CodeOptions, found: Mapping[int, Magnitudes], survey: Survey
) -> dict[int, Draft]:
    """The same code for every tensor.

    Parameters
    ----------
    found
        Histograms by segment.
    survey
        Of seeded values.
    """
    there = moving(found)
    drafts: list[Draft | None]
    if options.code == "signs" and options.density is not None:
        drafts = [sparse_draft(n, seen, options.density) for n, seen in there.items()]
    elif options.code == "levels" and options.bits is not None:
        drafts = [dense_draft(n, seen, options.bits) for n, seen in there.items()]
    elif options.code == "seeded" and options.bits is not None:
        values = survey(dict.fromkeys(there, options.stride))
        drafts = [seeded_draft(n, values[n], options.bits, options.stride) for n in values]
    else:
        raise OptionError(f"code={options.code!r}: it has no one code for every tensor")
    return {draft.segment: draft for draft in drafts if draft is not None}
