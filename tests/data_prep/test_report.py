"""The report is one page that needs nothing but a browser, holds the manifests' numbers and runs nothing it shows."""

import re
import shutil
from html.parser import HTMLParser

import pytest

from data_prep.findings import Findings, funnel, look_at
from data_prep.inspect import choose_tokenizer
from data_prep.manifest import read_manifest
from data_prep.mix import KIND as MIXTURE
from data_prep.report import page, text
from tests.browser import area, chromium, pixels
from tests.data_prep.made_folders import EVIL, make_documents, make_shards, make_tokenizer

READ = [f"Number {n}: {'some words of it ' * (n % 9)}the end." for n in range(1060)]
CLEAN = [one for n, one in enumerate(READ) if n % 5]
LONG = "gopher_repetition.above_max_duplicate_line_characters"
STEPS = {
    "normalize": {"removed": {}, "changed": {"NFC": 3}},
    "rules": {
        "removed": {"gopher: too short": 140, "<b>symbols</b>": 67, "never": 0, LONG: 5},
        "changed": {},
        "lines": {"c4": 9},
    },
}
SAMPLES = {
    "rules": {
        "gopher: too short": [
            {"key": 5, "place": "raw/a.jsonl:17", "id": "x1", "value": 0.25, "threshold": 50, "text": "Too short."},
            {"key": 6, "place": EVIL, "id": EVIL, "value": 3, "threshold": 50, "text": EVIL},
            {"key": 7, "place": "raw/a.jsonl:18", "text": "\n\nx" * 4000, "kept_text": "its twin"},
        ],
        "<b>symbols</b>": [{"key": n, "place": f"raw/c.jsonl:{n}", "text": EVIL} for n in range(20)],
    }
}
NAME = EVIL.replace("\ud800", "")  # a manifest is UTF-8
REJECTED = [{"file": EVIL, "line": n + 1, "category": ["json", NAME][n % 2], "reason": EVIL} for n in range(30)]
VOID = {"meta", "wbr", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """A page taken apart: elements as (name, attributes), their text, and whether every end has its beginning."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        self.faults += [f"{name} is not closed" for name in self._open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def all_text(self, *names: str) -> str:
        return "".join(data for name, data in self.texts if name in names or not names)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    tokenizer = make_tokenizer(root / "tokenizer", READ)
    make_documents(root / "clean", READ, CLEAN, steps=STEPS, samples=SAMPLES, rejected=REJECTED)
    sources = {f"{NAME}/{n}.jsonl": {"documents": n, "tokens": 100 * n} for n in range(1, 51)}
    encoder = {"name": "quick", "versions": ["quick 1.2"], "checked_during": {"documents": 77, "tokens": 81234}}
    make_shards(root / "shards", [*CLEAN[:-1], NAME], tokenizer, sources=sources, encoder=encoder)
    return root


@pytest.fixture(scope="module")
def found(made) -> list[Findings]:
    return [look_at(made / name) for name in ("clean", "shards", "tokenizer")]


@pytest.fixture(scope="module")
def source(found) -> str:
    return page(found, choose_tokenizer(None, found), documents=3)


def test_every_element_is_closed_in_order(source):
    parsed = Page(source)
    assert parsed.faults == []
    assert {"section", "details", "svg", "table", "pre", "figure"} <= {name for name, _ in parsed.elements}
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = [attributes["href"] for name, attributes in parsed.elements if name == "a"]
    assert anchors == [f"#{name}" for name in ids] and len(ids) == 9


def test_the_page_loads_nothing_and_runs_nothing(source):
    parsed = Page(source)
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "base"} & {n for n, _ in parsed.elements}
    for name, attributes in parsed.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "src"], (name, attributes)
        assert attributes.get("href", "#").startswith("#")
        assert "url(" not in (attributes.get("style") or "")
    policy = next(a["content"] for n, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    style = parsed.all_text("style")
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    # An address is text of a document, never an attribute.
    assert not [
        a for _, a in parsed.elements if any("://" in (value or "") for key, value in a.items() if key != "aria-label")
    ]


def test_what_documents_say_is_shown_not_obeyed(source):
    assert "<script" not in source and "<b>symbols" not in source and "\x00" not in source and "\x1b" not in source
    assert "\u202e" not in source
    parsed = Page(source)
    evil = EVIL.replace("\x00", "\\u0000").replace("\x1b", "\\u001b").replace("\u202e", "\\u202e")
    evil = evil.replace("\ud800", "\\ud800")
    assert evil in parsed.all_text("pre")
    assert evil in parsed.all_text("header") and evil in parsed.all_text("td")
    assert text('<a href="x">&\'') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;"


def test_a_document_that_begins_with_empty_lines_keeps_them(source):
    # A parser drops one newline after <pre>.
    assert '<pre dir="auto">\n\n\nx' in source
    assert f"and {3 * 4000 - 1500:,} characters more" in source


def test_the_funnel_is_the_manifests(source, found):
    rows = [a for name, a in Page(source).elements if name == "tr" and "data-documents" in a]
    assert [(int(row["data-documents"]), int(row["data-removed"])) for row in rows] == [
        (row.documents, row.removed) for row in funnel(found)
    ]
    assert [int(row["data-documents"]) for row in rows] == [1090, 1060, 1060, 848, 848]
    for shown in ("1,090", "1,060", "848", "−212", "77.8 %"):
        assert f">{shown}<" in source


def test_bars_are_as_long_as_the_numbers(source, found):
    bars = re.findall(r'<tr data-documents="(\d+)" data-removed="(\d+)">.*?<svg(.*?)</svg>', source)
    assert len(bars) == 5
    for documents, removed, bar in bars:
        widths = dict(re.findall(r'<rect class="(kept|gone)" x="[\d.]+%" width="([\d.]+)%"', bar))
        assert float(widths["kept"]) == pytest.approx(100 * int(documents) / 1090, abs=0.001)
        assert float(widths.get("gone", 0)) == pytest.approx(100 * int(removed) / 1090, abs=0.001)


def test_every_rule_shows_its_count_and_its_samples(source):
    rules = {a["data-reason"]: a for n, a in Page(source).elements if n == "details" and "data-reason" in a}
    assert {reason: int(a["data-count"]) for reason, a in rules.items()} == {
        "gopher: too short": 140,
        "<b>symbols</b>": 67,
        LONG: 5,
        "NFC": 3,
    }
    assert "Removed nothing: never." in source
    assert "<b>measured 0.25, threshold 50</b> · id x1" in source
    assert source.count('<article class="sample">') == 3 + 10 + 3 + 3  # removed by two rules, kept in two folders
    assert "3 of 140, drawn at random" in source and "10 of 67, drawn at random" in source


def test_histograms_hold_every_document(source, found):
    figures = re.findall(r"<figure>(.*?)</figure>", source, re.DOTALL)
    assert len(figures) == 2  # bytes of the documents, tokens of the shards
    counts = [int(count.replace(",", "")) for count in re.findall(r": ([\d,]+) documents", figures[0])]
    assert sum(counts) == 1060 + 848
    counts = [int(count.replace(",", "")) for count in re.findall(r": ([\d,]+) documents", figures[1])]
    assert sum(counts) == 848
    tops = [int(figure.split('<div class="y"><span>')[1].split("<")[0].replace(",", "")) for figure in figures]
    for figure, top in zip(figures, tops, strict=True):
        for height, count in re.findall(r'height="([\d.]+)"><title>.*?: ([\d,]+) documents', figure):
            assert float(height) == pytest.approx(180 * int(count.replace(",", "")) / top, abs=0.01)
            assert float(height) <= 180
        assert "as a table" in figure and "<h3>" in figure and 'class="x">' in figure


def test_sources_encoder_files_and_options_are_there(source, made):
    parsed = Page(source)
    cells = [data for name, data in parsed.texts if name == "td"]
    for cell in ("5,000", "3.92 %", "10 more files", "checked during: tokens", "81,234", "json", "15", "1.38 %"):
        assert cell in cells, cell
    for name in ("clean", "shards", "tokenizer"):
        for file, record in read_manifest(made / name).files.items():
            assert file in cells and f"{record.bytes:,}" in cells
            assert record.sha256 in parsed.all_text("code")
    assert '"command": "clean"' in parsed.all_text("pre")


def test_the_same_folders_give_the_same_page(found, source):
    assert page(found, choose_tokenizer(None, found), documents=3) == source


def test_folders_that_say_little_give_a_page_too(tmp_path, made):
    tokenizer = look_at(made / "tokenizer")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in (made / "shards").glob("*.[bi][id][nx]"):
        shutil.copy(path, foreign)
    empty = make_documents(tmp_path / "empty", [], [])
    for folders in ([tokenizer], [look_at(foreign)], [look_at(empty)]):
        parsed = Page(page(folders))
        assert parsed.faults == [] and str(folders[0].folder) in parsed.all_text()


def test_a_mixture_shows_weights_and_epochs(tmp_path, made, data_prep):
    shutil.copytree(made / "shards", tmp_path / "other")
    command = ("mix", "--shards", made / "shards", tmp_path / "other", "--weights", 3, 1)
    assert data_prep(*command, "--output_dir", tmp_path / "mixture").status == 0
    outcome = data_prep("inspect", tmp_path / "mixture", "--tokens", 1e6, "--report", tmp_path / "new/report.html")
    assert outcome.status == 0 and str(tmp_path / "new/report.html") in outcome.stdout
    parsed = Page((tmp_path / "new/report.html").read_text())
    cells = [data for name, data in parsed.texts if name == "td"]
    tokens = read_manifest(made / "shards").content["tokens"]
    assert look_at(tmp_path / "mixture").kind == MIXTURE
    for cell in ("75.0 %", "25.0 %", f"{0.75e6 / tokens:,.3f}", f"{0.25e6 / tokens:,.3f}"):
        assert cell in cells
    assert "training of 1,000,000 tokens" in parsed.all_text("p")


def test_a_report_that_cannot_be_written_is_one_error(made, tmp_path, data_prep):
    assert (
        "is a folder, expected the name of a file" in data_prep("inspect", made / "clean", "--report", tmp_path).error
    )
    (tmp_path / "file").write_text("")
    outcome = data_prep("inspect", made / "clean", "--report", tmp_path / "file/report.html")
    assert f"{tmp_path}/file" in outcome.error


def test_a_browser_shows_the_page(source, tmp_path):
    """In real chromium: the DOM is what was written, nothing of the documents ran, and the bars are on the picture."""
    (tmp_path / "report.html").write_text(source)
    address = f"file://{tmp_path}/report.html"
    dom = chromium(tmp_path, "--dump-dom", address).decode()
    shown, written = Page(dom), Page(source)
    assert [name for name, _ in shown.elements] == [name for name, _ in written.elements]
    assert [a for _, a in shown.elements] == [a for _, a in written.elements]
    chromium(tmp_path, f"--screenshot={tmp_path}/page.png", "--window-size=1000,900", address)
    image = pixels((tmp_path / "page.png").read_bytes())
    assert image.shape == (900, 1000, 3)
    kept, gone, paper = (area(image, colour) for colour in ("#2c6a8a", "#c25a35", "#fbfbf9"))
    assert paper > 0.6 * 900 * 1000  # a page of text, not a blank and not a black one
    # The funnel's bars are 13.6 pixels high: their areas are to one another as the documents.
    row = next(y for y in range(900) if area(image[y : y + 1], "#c25a35") and area(image[y : y + 1], "#2c6a8a") > 100)
    assert area(image[row : row + 1], "#2c6a8a") / area(image[row : row + 1], "#c25a35") == pytest.approx(
        1060 / 30, rel=0.15
    )
    assert kept > 5 * gone > 500


@pytest.mark.parametrize("width", [360, 1200])
def test_no_width_of_window_makes_the_page_scroll_sideways(width, source, tmp_path):
    """The page is laid out in a frame of this width, for a headless window is never narrower than 500 pixels."""
    (tmp_path / "report.html").write_text(source.replace("default-src 'none'; ", "default-src 'none'; frame-src *; "))
    measuring = (
        f'<iframe id="f" src="report.html" style="width:{width}px;height:900px;border:0"></iframe><p id="w"></p>'
        "<script>"
        "onload = () => { const d = document.getElementById('f').contentDocument.documentElement;"
        " document.getElementById('w').textContent = d.scrollWidth + ' of ' + d.clientWidth; }</script>"
    )
    (tmp_path / "frame.html").write_text(measuring)
    dom = chromium(
        tmp_path,
        "--allow-file-access-from-files",
        "--window-size=1400,1000",
        "--dump-dom",
        f"file://{tmp_path}/frame.html",
    )
    assert f'<p id="w">{width} of {width}</p>' in dom.decode()
