"""The page's style."""

from __future__ import annotations

from typing import Final

from tallstore.report.palette import DARK, LIGHT, css

__all__ = ["STYLE"]

STYLE: Final = f""":root {{ color-scheme: light dark; {css(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {css(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--bg); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--grid);
  padding-bottom: .3rem; }}
footer {{ color: var(--muted); margin-top: 3rem; font-size: .875rem; }}
.tiles {{ display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }}
.tiles div {{ background: var(--panel); border: 1px solid var(--grid); border-radius: .5rem;
  padding: .5rem .9rem; }}
.tiles dt {{ color: var(--muted); font-size: .8125rem; }}
.tiles dd {{ margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }}
.figures {{ display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }}
figure {{ margin: 0; min-width: 0; }}
figcaption {{ margin-bottom: .5rem; color: var(--muted); font-size: .9375rem; }}
figcaption strong {{ color: var(--ink); display: block; font-size: 1rem; }}
figcaption {{ overflow-wrap: anywhere; }}
.wide {{ grid-column: 1 / -1; }}
.scroll {{ overflow-x: auto; max-width: 100%; }}
.scroll:focus-visible, summary:focus-visible {{ outline: 2px solid var(--many);
  outline-offset: 2px; }}
svg {{ display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }}
details {{ margin-top: .5rem; }}
summary {{ cursor: pointer; color: var(--muted); font-size: .875rem; padding: .35rem 0; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums;
  margin: .25rem 0 1rem; }}
caption {{ position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }}
th, td {{ padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }}
th {{ font-weight: 600; }}
tbody th {{ font-weight: 400; }}
th:first-child {{ text-align: left; padding-left: 0; max-width: 18rem;
  white-space: normal; overflow-wrap: break-word; }}
code {{ font-family: ui-monospace, "DejaVu Sans Mono", monospace; }}
"""
