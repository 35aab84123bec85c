"""``tallstore report``: the page, what is in it, and that a browser shows it."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, Browser
from cli_helpers import TASKS, make_store, make_zoo, ok, ok_json, refused
from zoo import ROOT, fine_tune, make_base, run_child

import tallstore
from tallstore.errors import OptionError, StoreClosedError, StoreExistsError
from tallstore.report import write_report
from tallstore.report.palette import DARK, LIGHT, ROLES, SENTINELS

matplotlib = pytest.importorskip("matplotlib")

HOSTILE = ("<script>alert(1)<|script>", "\" onload & '", "$frac{1}{2}$", "法律", "#01fe05 url(#x)")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(make_zoo(tmp_path_factory.mktemp("zoo")))


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path / "zoo.tall"))


class Page(HTMLParser):
    """Elements in order, with their attributes and all the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs), list[str]())
        assert len(dict(attrs)) == len(attrs)
        self.elements.append(element)
        if tag not in ("meta", "br"):
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for _, _, texts in self._open:
            texts.append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, "".join(texts)) for name, attrs, texts in self.elements if name == tag]


def make_page(path: Path, out: Path, **options: Any) -> tuple[str, Page]:
    with tallstore.open(path) as store:
        (made, *_) = write_report(store, out, **options)
    assert made == out
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def hostile_store(path: Path) -> Path:
    base = {"<script>alert(2)</script>.weight": torch.randn(40, 20), "a\x00\x1b.b": torch.ones(9)}
    tasks = {
        name: {k: v + torch.randn(v.shape) for k, v in base.items()}
        for name in (*HOSTILE, "x" * 255)
    }
    tallstore.pack(path, base, tasks, exact=True)
    return path


# -- the page -----------------------------------------------------------------------------

CHARTS = ["size", "stored", "fidelity", "use", "selfish", "layers", "density", "overlap"]


def test_every_chart_is_told_in_words_and_numbers(store: Path, tmp_path: Path) -> None:
    _, page = make_page(store, tmp_path / "r.html")
    assert [attrs["id"] for attrs, _ in page.all("figure")] == CHARTS
    known = {attrs["id"]: "".join(texts) for _, attrs, texts in page.elements if "id" in attrs}
    identities = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(set(identities)) == len(identities), "an id twice"
    pictures = page.all("svg")
    assert len(pictures) == len(CHARTS)
    for name, (attrs, _) in zip(CHARTS, pictures, strict=True):
        assert attrs["role"] == "img"
        assert attrs["aria-labelledby"] == f"{name}-title {name}-desc"
        assert len(known[f"{name}-title"]) > 10 and len(known[f"{name}-desc"]) > 10
        assert "viewbox" in attrs and "width" not in attrs and "height" not in attrs
    assert len(page.all("details")) == len(page.all("summary")) == len(CHARTS)
    assert len(page.all("table")) == len(CHARTS) + 1
    for attrs, _ in page.all("th"):
        assert attrs["scope"] in ("col", "row")
    (html,) = page.all("html")
    assert html[0]["lang"] == "en"
    assert any(attrs.get("name") == "viewport" for attrs, _ in page.all("meta"))
    assert "zoo.tall" in page.all("title")[0][1]


def test_the_numbers_are_the_librarys(store: Path, tmp_path: Path) -> None:
    _, page = make_page(store, tmp_path / "r.html", cosine=True)
    with tallstore.open(store) as opened:
        found = opened.statistics(cosine=True)
        sizes = {task: opened.stored_bytes(task) for task in TASKS}
    assert found.cosine is not None and found.cosine_from == "exact"
    tables = {attrs["id"]: words for attrs, words in page.all("figure")}
    for weights in found.use.histogram:
        assert f"{weights:,}" in tables["use"]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert f"{found.jaccard[i][j]:.2f}" in tables["overlap"]
        assert f"{found.cosine[i][j]:z.2f}" in tables["cosine"]
    for name, task in found.tasks.items():
        assert name in tables["selfish"] and f"{task.exclusive:,}" in tables["selfish"]
        assert f"{sizes[name] / 1000:.1f} kB" in tables["stored"]
    for layer in found.layers:
        assert f"{layer.tasks['math'].density:.3f}" in tables["density"]
    assert "masks + exact" in page.all("table")[2][1]


def test_it_needs_nothing_from_outside(store: Path, tmp_path: Path) -> None:
    text, page = make_page(store, tmp_path / "r.html")
    assert not page.all("script") and not page.all("img") and not page.all("link")
    assert "http:" not in text and "https:" not in text and "@import" not in text
    for _, attrs, _ in page.elements:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("href", "xlink:href"):
            assert (attrs.get(name) or "#").startswith("#")
    for found in re.findall(r"url\(([^)]*)\)", text):
        assert any(attrs.get("id") == found.strip("'\"")[1:] for _, attrs, _ in page.elements)
    policy = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv")]
    assert policy and "default-src 'none'" in str(policy[0])


def test_charts_take_their_colours_from_the_page(store: Path, tmp_path: Path) -> None:
    text, _ = make_page(store, tmp_path / "r.html")
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-fA-F]{6}", pictures), "a colour of neither palette"
    used = set(re.findall(r"var\(--(\w+)\)", pictures))
    assert {"ink", "muted", "grid", "none", "one", "many", "heat"} <= used <= set(ROLES)
    assert "font-family" not in pictures and "<text" in pictures
    # text without a colour of its own would be black in the dark
    for attributes in re.findall(r"<text([^>]*)>", pictures):
        assert "fill: var(--" in attributes
    for palette in (LIGHT, DARK):
        for role, colour in palette.items():
            assert f"--{role}: {colour};" in text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(palette: dict[str, str]) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert set(palette) == set(SENTINELS) == set(ROLES)
    for ground in ("bg", "panel", "heat"):
        assert contrast(palette["ink"], palette[ground]) >= 4.5
    assert contrast(palette["muted"], palette["bg"]) >= 4.5
    assert contrast(palette["muted"], palette["panel"]) >= 4.5
    for mark in ("none", "one", "many", "rest"):
        assert contrast(palette[mark], palette["bg"]) >= 3


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    text, page = make_page(hostile_store(tmp_path / "<b>z&.tall"), tmp_path / "r.html")
    assert not page.all("script") and "<script" not in text and "<b>" not in text
    assert "\x00" not in text and "\x1b" not in text and r"a\x00\x1b" in text
    shown = {words for _, words in page.all("th")}
    assert {*HOSTILE, "x" * 255, "<script>alert(2)</script>"} <= shown
    inside = {words for _, words in page.all("text")}
    assert {HOSTILE[1], HOSTILE[2], HOSTILE[3], HOSTILE[4]} <= inside
    assert page.all("h1")[0][1] == "<b>z&.tall"


def test_the_same_store_gives_the_same_files(store: Path, tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red", "svg.fonttype": "path"}):
        for name in ("a", "b"):
            folder = tmp_path / name
            folder.mkdir()
            copy = Path(shutil.copy(store, folder / "zoo.tall"))
            ok("report", copy, "-o", folder / "r.html", "--png", folder / "png", "--cosine", "-q")
            matplotlib.rcParams["font.size"] = 10
    a, b = tmp_path / "a", tmp_path / "b"
    assert (a / "r.html").read_bytes() == (b / "r.html").read_bytes()
    assert str(tmp_path) not in (a / "r.html").read_text()
    images = sorted(path.name for path in (a / "png").iterdir())
    assert images == sorted(f"{name}.png" for name in [*CHARTS, "cosine"])
    for name in images:
        data = (a / "png" / name).read_bytes()
        assert data.startswith(b"\x89PNG") and data == (b / "png" / name).read_bytes()


def test_matplotlibs_settings_are_left_alone(store: Path, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    make_page(store, tmp_path / "r.html")
    assert dict(matplotlib.rcParams) == before


def test_stores_of_every_kind(tmp_path: Path) -> None:
    base = make_base()
    path = tmp_path / "plain.tall"
    tallstore.save(base, path)
    text, page = make_page(path, tmp_path / "0.html")
    assert [attrs["id"] for attrs, _ in page.all("figure")] == ["size"]
    assert "No task of this store has masks" in text
    tallstore.save(fine_tune(base, 0), path, task="one")
    text, page = make_page(path, tmp_path / "1.html")
    assert [attrs["id"] for attrs, _ in page.all("figure")] == ["size", "stored"]
    assert "No task of this store has masks" in text and "1 fine-tune and its base" in text
    tallstore.pack(tmp_path / "single.tall", base, {"only": fine_tune(base, 0)})
    text, page = make_page(tmp_path / "single.tall", tmp_path / "2.html", cosine=True)
    names = [attrs["id"] for attrs, _ in page.all("figure")]
    assert names == CHARTS[:-1], "no pairs where there is one task"
    tallstore.pack(tmp_path / "same.tall", base, {"same": dict(base)})
    _, page = make_page(tmp_path / "same.tall", tmp_path / "3.html")
    assert [attrs["id"] for attrs, _ in page.all("figure")] == ["size", "stored"]


def test_many_tasks(tmp_path: Path) -> None:
    base = make_base()
    tasks = {f"task {n}": fine_tune(base, n) for n in range(30)}
    tallstore.pack(tmp_path / "z.tall", base, tasks)
    text, page = make_page(tmp_path / "z.tall", tmp_path / "r.html")
    classes = {a["id"]: a.get("class") for a, _ in page.all("figure")}
    assert classes["overlap"] == classes["density"] == "wide" and classes["use"] is None
    assert "The numbers are in the table" in text


# -- writing ------------------------------------------------------------------------------


def test_what_is_there_is_not_replaced_unasked(store: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "r.html", tmp_path / "png"
    out.write_text("mine")
    message = refused("report", store, "-o", out)
    assert "there already" in message and "--overwrite" in message
    assert "--yes" in refused("report", store, "-o", out, "--overwrite")  # nobody to ask
    assert out.read_text() == "mine"
    ok("report", store, "-o", out, "--overwrite", "--yes")
    assert out.read_text().startswith("<!DOCTYPE html>")
    images.mkdir()
    (images / "use.png").write_text("mine")
    assert "use.png" in refused("report", store, "-o", tmp_path / "s.html", "--png", images)
    assert not (tmp_path / "s.html").exists() and (images / "use.png").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_the_store_is_never_replaced(store: Path, tmp_path: Path) -> None:
    before = store.read_bytes()
    link = tmp_path / "link.html"
    link.symlink_to(store)
    hard = tmp_path / "hard.html"
    hard.hardlink_to(store)
    for place in (store, link, hard):
        message = refused("report", store, "-o", place, "--overwrite", "--yes")
        assert "the store itself" in message
    assert store.read_bytes() == before


def test_places_that_cannot_be_written(store: Path, tmp_path: Path) -> None:
    assert "a directory is in the way" in refused("report", store, "-o", tmp_path)
    assert "no directory" in refused("report", store, "-o", tmp_path / "no" / "r.html")
    (tmp_path / "file").write_text("")
    message = refused("report", store, "-o", tmp_path / "r.html", "--png", tmp_path / "file")
    assert "a file is in the way" in message
    missing = refused("report", store, "-o", tmp_path / "r.html", "--png", tmp_path / "a" / "b")
    assert str(tmp_path / "a") in missing
    assert not list(tmp_path.glob("*.html"))
    assert "nowhere.tall" in refused("report", tmp_path / "nowhere.tall", "-o", tmp_path / "r.html")
    assert "-o" in refused("report", store, code=2)


def test_a_failed_write_leaves_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tallstore.report.writing.os.replace", full)
    before = sorted(tmp_path.iterdir())
    assert "no space left" in refused("report", store, "-o", tmp_path / "r.html")
    assert sorted(tmp_path.iterdir()) == before


def test_without_matplotlib(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refused("report", store, "-o", tmp_path / "r.html")
    assert "matplotlib" in message and "pip install 'tallstore[report]'" in message
    assert not (tmp_path / "r.html").exists()
    assert ok("stats", store), "all else works without"


def test_matplotlib_is_imported_by_nothing_else(tmp_path: Path) -> None:
    run_child(
        """
import sys
import tallstore, torch, tallstore.cli.root, tallstore.report
base = {"w": torch.randn(30, 30)}
tallstore.pack(sys.argv[1], base, {"t": {"w": base["w"] + torch.randn(30, 30)}})
with tallstore.open(sys.argv[1]) as store:
    store.statistics(cosine=True)
assert "matplotlib" not in sys.modules
""",
        tmp_path / "z.tall",
    )


def test_the_library_refuses_alike(store: Path, tmp_path: Path) -> None:
    opened = tallstore.open(store)
    with pytest.raises(OptionError, match="the store itself"):
        write_report(opened, store, overwrite=True)
    (tmp_path / "r.html").touch()
    with pytest.raises(StoreExistsError, match="overwrite=True"):
        write_report(opened, tmp_path / "r.html")
    opened.close()
    with pytest.raises(StoreClosedError):
        write_report(opened, tmp_path / "s.html")


def test_json(store: Path, tmp_path: Path) -> None:
    facts = ok_json("report", store, "-o", tmp_path / "r.html", "--png", tmp_path / "png")
    assert facts["store"] == str(store)
    assert facts["files"][0] == {
        "path": str(tmp_path / "r.html"),
        "bytes": (tmp_path / "r.html").stat().st_size,
    }
    assert len(facts["files"]) == 1 + len(CHARTS)


# -- in a browser -------------------------------------------------------------------------

MEASURE = """(() => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  const outside = [];
  document.querySelectorAll("svg").forEach(svg => {
    const whole = svg.getBoundingClientRect();
    svg.querySelectorAll("text").forEach(t => {
      const r = t.getBoundingClientRect();
      if (r.left < whole.left - 1 || r.right > whole.right + 1 || r.top < whole.top - 1 ||
          r.bottom > whole.bottom + 1) outside.push(t.textContent);
    });
  });
  const style = getComputedStyle(document.body);
  return {
    charts: [...document.querySelectorAll("figure > .scroll svg")].map(box),
    marks: [...document.querySelectorAll("svg")].map(
      s => [...s.querySelectorAll("path")].filter(p => {
        const r = p.getBoundingClientRect(); return r.width > 0 && r.height > 0; }).length),
    letters: Math.min(...[...document.querySelectorAll("svg text")].map(
      t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getScreenCTM().a)),
    tables: [...document.querySelectorAll("table")].map(box),
    outside: outside,
    scripts: document.scripts.length,
    width: document.documentElement.scrollWidth,
    colours: [style.backgroundColor, style.color],
    bar: getComputedStyle(document.querySelector("#stored svg path[style*='--many']")).fill,
  };
})()"""


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module", params=["zoo", "hostile"])
def shown(
    request: pytest.FixtureRequest, made: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A page, on disk."""
    folder = tmp_path_factory.mktemp("page")
    path = made if request.param == "zoo" else hostile_store(folder / "h.tall")
    make_page(path, folder / "r.html", cosine=True)
    return folder / "r.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360], ids=["desk", "phone"])
def test_a_browser_shows_every_chart(browser: Browser, shown: Path, dark: bool, width: int) -> None:
    browser.problems.clear()
    browser.open(shown, width=width, height=900, dark=dark)
    found = browser.evaluate(MEASURE)
    assert browser.problems == []
    assert len(found["charts"]) == len(CHARTS) + 1
    assert all(w > 250 and h > 60 for w, h in found["charts"])
    assert all(count >= 2 for count in found["marks"]), "a chart without marks"
    assert len(found["tables"]) == len(CHARTS) + 2
    assert all(w > 0 and h > 0 for w, h in found["tables"])
    assert found["outside"] == [], "text that is cut off"
    assert found["letters"] >= 7, "text too small to read"
    assert found["scripts"] == 0
    assert found["width"] <= width, "the page scrolls sideways"
    palette = DARK if dark else LIGHT
    assert found["colours"] == [rgb(palette["bg"]), rgb(palette["ink"])]
    assert found["bar"] == rgb(palette["many"])


def test_the_browser_notices(browser: Browser, tmp_path: Path) -> None:
    """That the checks above can fail."""
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('x'); nothere()</script><img src=gone.png>")
    browser.problems.clear()
    browser.open(page, width=500, height=500, dark=False)
    assert len(browser.problems) >= 3, browser.problems


def test_the_manual_shows_the_command() -> None:
    assert "tallstore report" in (ROOT / "README.md").read_text()
