"""A report's files, each written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from pathlib import Path

from tallstore.engine.environment import lmdb_errors
from tallstore.engine.filesystem import sync_directory
from tallstore.errors import OptionError, StoreExistsError
from tallstore.progress import Report
from tallstore.report.charts import Chart, charts
from tallstore.report.drawing import settings
from tallstore.report.facts import gather
from tallstore.report.page import page
from tallstore.report.palette import LIGHT
from tallstore.store import StorePath, TallStore, store_path

__all__ = ["write_report"]

_DPI = 200


def write_report(
    store: TallStore,
    out: StorePath,
    *,
    png: StorePath | None = None,
    cosine: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> list[Path]:
    """Write what is in a store as one self-contained HTML page.

    Parameters
    ----------
    store
        Stays open.
    out
        The page's file.
    png
        A directory for the charts alone, as ``NAME.png``; made if it is not there.
    cosine
        Decode the task vectors as well, and show the cosines between them.
    overwrite
        Replace files of these names; the store itself is never replaced.
    report
        Told of progress.

    Returns
    -------
    list of Path
        The files made, the page first.

    Raises
    ------
    OptionError
        matplotlib is not installed, or a path makes no sense.
    StoreExistsError
        A file is there already, and `overwrite` is false.
    """
    place = store_path(out)
    folder = None if png is None else store_path(png)
    _check_page(store, place, overwrite=overwrite)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder}: a file is in the way; --png takes a directory")
    with settings():  # before the work: whether matplotlib is there
        pass
    facts = gather(store, cosine=cosine, report=report)
    shown = charts(facts)
    files = {place: page(facts, shown).encode("utf-8")}
    if folder is not None:
        images = {folder / f"{chart.name}.png": chart for chart in shown}
        for path in images:
            _check_free(path, overwrite=overwrite)
        files |= {path: _png(chart) for path, chart in images.items()}
        with lmdb_errors(folder, doing="make it"):
            folder.mkdir(exist_ok=True)
    for path, data in files.items():
        _write(path, data)
    return list(files)


def _check_page(store: TallStore, place: Path, *, overwrite: bool) -> None:
    if place.is_dir():
        raise OptionError(f"{place}: a directory is in the way; name a file, such as report.html")
    if not place.parent.is_dir():
        raise OptionError(f"{place}: there is no directory {place.parent}; make it first")
    if place.exists() and place.samefile(store.path):
        raise OptionError(f"{place}: that is the store itself; name another file, report.html")
    _check_free(place, overwrite=overwrite)


def _check_free(place: Path, *, overwrite: bool) -> None:
    if place.exists() and not overwrite:
        raise StoreExistsError(
            f"{place}: there already; give overwrite=True (--overwrite) to replace it, or "
            "another name"
        )


def _png(chart: Chart) -> bytes:
    buffer = io.BytesIO()
    with settings():
        figure = chart.draw(LIGHT)
        figure.suptitle(chart.title, color=LIGHT["ink"], fontweight="bold")  # no page to say it
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with lmdb_errors(path, doing="write"):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        sync_directory(path.parent)
