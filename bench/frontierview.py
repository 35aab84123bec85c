"""The frontier as a table for the README and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

TITLES: Final = {
    "frontier-minilm": "text: MiniLM, 8 tasks",
    "frontier-vision": "vision: EfficientNet-Lite0, 8 tasks",
    "frontier-language": "language model: bytes, 6 sources",
}
#: What the picture shows; lower lies too far from the rest to be told apart.
FLOOR: Final = 0.6
COLOURS: Final = {
    "tallstore": "#d62728",
    "tallstore, calibrated": "#000000",
    "tallstore, distilled": "#ff00aa",
    "TALL+TA": "#1f77b4",
    "TALL+TIES": "#17becf",
    "EMR-Merging": "#2ca02c",
    "BitDelta": "#8c564b",
    "magnitude pruning": "#7f7f7f",
    "DARE": "#bcbd22",
    "ComPEFT": "#9467bd",
    "T-Switch": "#e377c2",
    "UltraDelta": "#ff7f0e",
    "TVQ": "#393b79",
    "TSV-Compress": "#637939",
}
MARKERS: Final = "odDPX*vs^<>phH"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay rows out as a Markdown table: an entrant a line, bits, kept and worst task a zoo."""
    zoos = list(dict.fromkeys(row["zoo"] for row in rows))
    entrants = list(dict.fromkeys((row["code"], row["setting"]) for row in rows))
    found = {(row["zoo"], row["code"], row["setting"]): row for row in rows}
    lines = [
        "| code | setting |" + "".join(f" {zoo}: bits | kept | worst |" for zoo in zoos),
        "|---|---|" + "---|---|---|" * len(zoos),
    ]
    for code, setting in entrants:
        cells = []
        for zoo in zoos:
            row = found.get((zoo, code, setting))
            if row is None:
                cells += ["", "", ""]
            else:
                kept = f"{row['kept_mean']:.2%} ± {100 * row['error']:.2f}"
                cells += [f"{row['bits']:.3g}", kept, f"{row['kept_worst']:.1%}"]
        lines.append(f"| {code} | {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw what is kept against bits, a panel a zoo, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(found), figsize=(5 * len(found), 5), squeeze=False, layout="constrained"
    )
    for panel, (name, rows) in zip(panels[0], found.items(), strict=True):
        for (code, colour), marker in zip(COLOURS.items(), MARKERS, strict=True):
            points = sorted(
                (row["bits"], row["kept_mean"], row["error"]) for row in rows if row["code"] == code
            )
            if not points:
                continue
            bits, kept, error = zip(*points, strict=True)
            ours = code == "tallstore"
            bars = [e if k > FLOOR else 0.0 for k, e in zip(kept, error, strict=True)]
            panel.errorbar(
                bits, [max(k, FLOOR) for k in kept], yerr=bars, color=colour, marker=marker,
                markersize=8 if ours else 5, linewidth=2.2 if ours else 0.9, label=code,
                zorder=3 if ours else 2, capsize=2,
            )  # fmt: skip
        panel.set_xscale("log")
        panel.set_ylim(FLOOR - 0.01, 1.03)
        panel.axhline(1.0, color="black", linewidth=0.6)
        panel.set_title(TITLES.get(name, name))
        panel.set_xlabel("bits per weight and task")
        panel.grid(True, which="major", linewidth=0.3)
        panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    panels[0][0].set_ylabel(f"kept of the fine-tuned (drawn at {FLOOR:.0%} where less)")
    shown = [panel.get_legend_handles_labels() for panel in panels[0]]
    named = {label: handle for pair in shown for handle, label in zip(*pair, strict=True)}
    order = [code for code in COLOURS if code in named]
    figure.legend(
        [named[code] for code in order], order, loc="outside lower center", ncols=6, frameon=False
    )
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
