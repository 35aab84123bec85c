"""The report as one HTML page that needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from tallstore.report.charts import FIDELITY, SECTIONS, SHARING, Chart, Table
from tallstore.report.drawing import WIDTH, settings
from tallstore.report.facts import ReportFacts, TaskFacts
from tallstore.report.palette import SENTINELS
from tallstore.report.style import STYLE
from tallstore.report.svg import inline_svg
from tallstore.wording import number, percent, plural, printable, ratio, size

__all__ = ["page"]

#: Even a name that slipped through unescaped could then do nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(facts: ReportFacts, charts: Sequence[Chart]) -> str:
    """The whole page."""
    name = escape(printable(facts.name))
    sections = [_summary(facts)]
    by_section = {h: list(g) for h, g in groupby(charts, key=lambda chart: chart.section)}
    for heading in SECTIONS:
        parts = [_tasks(facts)] if heading == FIDELITY and facts.tasks else []
        parts += [_figure(chart) for chart in by_section.get(heading, ())]
        if parts:
            figures = "\n".join(parts)
            sections.append(
                f'<section>\n<h2>{escape(heading)}</h2>\n<div class="figures">\n{figures}\n'
                "</div>\n</section>"
            )
    if facts.statistics is None:
        sections.append(
            f"<section>\n<h2>{SHARING}</h2>\n<p>No task of this store has masks, so "
            "there is nothing to compare; <code>tallstore pack</code> makes them.</p>\n</section>"
        )
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}: tallstore report</title>
<style>
{STYLE}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p>{escape(_sentence(facts))}</p>
</header>
<main>
{body}
</main>
<footer>
<p>Written by {escape(printable(facts.written_by))}, {escape(printable(facts.created))}.
Base {escape(facts.identity[:16])}, {facts.weights:,} weights.</p>
</footer>
</body>
</html>
"""


def _sentence(facts: ReportFacts) -> str:
    count = len(facts.tasks)
    whose = "its" if count == 1 else "their"
    what = f"{plural(count, 'fine-tune')} and {whose} base" if count else "A base alone"
    if facts.external:
        what = f"{plural(count, 'fine-tune')} of the base in {printable(facts.external)}"
    return (
        f"{what}: {size(facts.originals)} of checkpoints in one file of {size(facts.file)}, "
        f"{_left(facts)} of them."
    )


def _left(facts: ReportFacts) -> str:
    if facts.file < facts.originals:
        return ratio(facts.originals, facts.file)
    return percent(facts.file, facts.originals)


def _summary(facts: ReportFacts) -> str:
    bits = 8 * (facts.vector_stored + sum(task.stored for task in facts.tasks))
    weights = sum(task.record.weights for task in facts.tasks)
    exact = sum(task.record.exact for task in facts.tasks)
    tiles = [
        ("tasks", str(len(facts.tasks))),
        ("of the originals", _left(facts)),
        ("bits a weight and task", number(bits / weights) if weights else ""),
        ("load bit for bit", f"{exact} of {len(facts.tasks)}" if facts.tasks else ""),
        ("shared vector", facts.vector_about),
    ]
    items = "\n".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(printable(value))}</dd></div>"
        for what, value in tiles
        if value
    )
    return f'<dl class="tiles">\n{items}\n</dl>'


def _figure(chart: Chart) -> str:
    with settings():
        drawn = chart.draw(SENTINELS)
        picture = inline_svg(drawn, name=chart.name, title=chart.title, description=chart.caption)
        wide = ' class="wide"' if drawn.get_figwidth() > 1.3 * WIDTH else ""
    title, caption = escape(chart.title), escape(chart.caption)
    return f"""<figure id="{chart.name}"{wide}>
<figcaption><strong>{title}</strong> {caption}</figcaption>
{_scrolled(picture, f"{chart.title}, chart")}
<details>
<summary>Numbers: {title}</summary>
{_table(chart.table, chart.title)}
</details>
</figure>"""


def _scrolled(content: str, label: str) -> str:
    """`content` in a box that scrolls by itself, by keyboard too."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">\n'
        f"{content}\n</div>"
    )


def _table(table: Table, label: str) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in table.titles)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    content = (
        f"<table>\n<caption>{escape(label)}</caption>\n<thead>\n<tr>{head}</tr>\n</thead>\n"
        f"<tbody>\n{rows}\n</tbody>\n</table>"
    )
    return _scrolled(content, f"{label}, table")


def _tasks(facts: ReportFacts) -> str:
    titles = ("task", "kept as", "loads as", "error", "density", "lambda", "score")
    rows = [_task_row(task) for task in facts.tasks]
    # What no task has, a score for one, would only take room.
    kept = [n for n in range(len(titles)) if any(row[n] for row in rows)]
    shown = Table(
        tuple(titles[n] for n in kept), tuple(tuple(row[n] for n in kept) for row in rows)
    )
    return _table(shown, "Tasks")


def _task_row(task: TaskFacts) -> tuple[str, ...]:
    record = task.record
    return (
        printable(task.name),
        task.record.kept_as,
        "bit for bit" if record.exact else "approximation",
        number(record.relative_error),
        number(record.density),
        number(record.tall_lambda),
        number(record.score, 4),
    )
