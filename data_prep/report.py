"""What `inspect` knows of some folders, as one HTML page that needs nothing but a browser.

Style and pictures are inline, there is no script, and a content security policy forbids both scripts and addresses,
so that a page made of the worst of the web's documents can be opened and sent around.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep import durable, mix
from data_prep.documents import REJECTED_NAME
from data_prep.encoding import Encoder, TokenizerInfo
from data_prep.findings import (
    Fertility,
    Findings,
    StepCounts,
    bin_bounds,
    fertility_of_documents,
    fertility_of_shards,
    funnel,
    gaps,
    human_bytes,
    kept_texts,
    token_lengths,
    visible,
)
from data_prep.inspect import fertility_rows, foreign_table, measured_of, others_of, shown, sources_shown, texts_of
from data_prep.shards import KIND as SHARDS
from data_prep.shards import ShardSet, unigram_entropy
from data_prep.write_documents import KIND as DOCUMENTS

_SAMPLES_SHOWN = 10
_SAMPLE_CHARACTERS = 1500
_SOURCES_SHOWN = 40
_FILES_SHOWN = 200
_PLOT_HEIGHT = 180

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --panel: #f3f3ef; --ink: #1b1d20; --muted: #62666c;
  --rule: #dededa; --kept: #2c6a8a; --read: #b4cad5; --gone: #c25a35; }
@media (prefers-color-scheme: dark) { :root { --paper: #141619; --panel: #1c1f23; --ink: #e4e4e0; --muted: #9ba0a6;
  --rule: #30343a; --kept: #68aecd; --read: #34505e; --gone: #e28a63; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0; }
h2 { font-size: 1.2rem; line-height: 1.3; font-weight: 650; margin: 3.2rem 0 .3rem; padding-top: 1rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; font-weight: 650; margin: 1.8rem 0 .2rem; }
p { margin: .2rem 0 1rem; max-width: 44rem; }
.muted, .note, caption, figcaption { color: var(--muted); }
.small, .note, caption, figcaption { font-size: .86rem; }
nav { margin: 1.4rem 0 0; font-size: .9rem; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
nav a { color: var(--kept); text-decoration: none; border-bottom: 1px solid var(--rule); }
nav a:hover, nav a:focus { border-color: currentColor; }
dl.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1.2rem 1.5rem;
  margin: 2rem 0 0; padding: 1.2rem 0; border-top: 2px solid var(--ink); border-bottom: 1px solid var(--rule); }
dl.figures div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
dl.figures dt { color: var(--muted); font-size: .86rem; line-height: 1.35; }
dl.figures dd { margin: 0; white-space: nowrap; font-size: 1.55rem; line-height: 1.25; font-weight: 600;
  letter-spacing: -.01em; }
dd, td, th, .number, figure { font-variant-numeric: tabular-nums lining-nums; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; margin: .6rem 0 1rem; }
caption { text-align: left; padding-bottom: .4rem; }
th { font-weight: 600; font-size: .82rem; color: var(--muted); text-align: left; vertical-align: bottom;
  padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--rule); }
td { padding: .36rem .7rem .36rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
th.number, td.number { text-align: right; white-space: nowrap; }
td.bar { width: 38%; vertical-align: middle; }
td.name { overflow-wrap: anywhere; }
tr.stage td { border-bottom-color: transparent; padding: .9rem 0 .1rem; font-size: .82rem; color: var(--muted); }
tr.reason td { border-bottom-color: transparent; padding-top: .05rem; padding-bottom: .05rem; font-size: .85rem;
  color: var(--muted); }
tr.reason td.name { padding-left: 1rem; }
table.narrow { width: auto; } table.narrow td, table.narrow th { padding-right: 1.6rem; }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; overflow: visible; }
svg.bar { height: .85rem; }
.kept { fill: var(--kept); } .read { fill: var(--read); } .gone { fill: var(--gone); } .track { fill: var(--panel); }
svg line { stroke: var(--rule); stroke-width: 1; }
svg text { fill: var(--muted); font-size: .78rem; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 .9em; vertical-align: -.06em; }
.key:first-child { margin-left: 0; }
.key.kept { background: var(--kept); } .key.read { background: var(--read); } .key.gone { background: var(--gone); }
figure { margin: 1rem 0 1.4rem; }
figure h3 { margin: 0; }
.plot { display: grid; grid-template-columns: auto 1fr; gap: 0 .6rem; margin-top: .7rem; }
.plot .y { display: flex; flex-direction: column; justify-content: space-between; text-align: right;
  font-size: .78rem; line-height: 1; color: var(--muted); margin: -.39rem 0 calc(1.6rem - .39rem); }
.plot .x { grid-column: 2; text-align: center; font-size: .82rem; color: var(--muted); }
details { border-bottom: 1px solid var(--rule); }
details > summary { cursor: pointer; padding: .4rem 0; font-size: .93rem; }
details.plain { border: 0; } details.plain > summary { color: var(--muted); font-size: .86rem; }
summary:focus-visible, a:focus-visible { outline: 2px solid var(--kept); outline-offset: 2px; }
details.rule > summary { display: grid; grid-template-columns: 1rem minmax(0, 27rem) minmax(0, 1fr) 6rem 4.5rem;
  gap: .7rem; align-items: center; list-style: none; }
details.rule > summary::-webkit-details-marker { display: none; }
details.rule > summary::before { content: "\\25b8"; color: var(--muted); font-size: .8rem; }
details.rule[open] > summary::before { content: "\\25be"; }
details.rule.empty > summary { cursor: default; } details.rule.empty > summary::before { content: ""; }
details.rule summary span { overflow-wrap: anywhere; }
details.rule .number { text-align: right; }
.samples { padding: .2rem 0 1rem 1.7rem; }
.sample { margin: .8rem 0 1.2rem; }
.sample header { font-size: .84rem; color: var(--muted); overflow-wrap: anywhere; }
.sample header b { color: var(--ink); font-weight: 600; }
pre { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--panel); margin: .35rem 0 0; padding: .7rem .9rem; border-radius: 3px; max-height: 15rem;
  overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
code { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
td code { overflow-wrap: anywhere; }
.pieces span { display: inline-block; margin: .15rem .3rem .15rem 0; padding: .05rem .45rem; background: var(--panel);
  border-radius: 3px; font: .82rem ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--muted);
  font-size: .84rem; }
@media (max-width: 40rem) {
  main { padding: 1.8rem 1.1rem 3rem; }
  dl.figures { grid-template-columns: 1fr 1fr; }
  table.bars, table.bars tbody { display: block; }
  table.bars thead { display: none; }
  table.bars tr { display: grid; grid-template-columns: minmax(0, 1fr) 5rem 4.2rem; gap: 0 .6rem;
    border-bottom: 1px solid var(--rule); padding: .45rem 0; }
  table.bars tr.reason { border: 0; padding: .05rem 0; } table.bars tr.stage { border: 0; padding: .7rem 0 0; }
  table.bars td { border: 0; padding: 0; }
  table.bars tr.reason td.name { padding-left: 1rem; }
  table.bars td.bar { grid-column: 1 / -1; grid-row: 2; width: auto; padding: .25rem 0; }
  table.bars td.bar:empty, table.bars td.extra { display: none; }
  table.bars td.name { grid-column: 1; }
  details.rule > summary { grid-template-columns: 1rem minmax(0, 1fr) 4.5rem 4.2rem;
    gap: .1rem .6rem; }
  details.rule > summary svg { grid-column: 2 / -1; grid-row: 2; }
  .samples { padding-left: 0; }
}
@media print { pre { max-height: none; } main { max-width: none; padding: 0; } nav { display: none; } }
"""


def write(
    path: Path,
    found: Sequence[Findings],
    tokenizer: tuple[TokenizerInfo, Encoder] | None,
    documents: int,
    tokens: float | None,
) -> None:
    """Replaces `path` by the page of these folders, in the order of the documents' way through them.

    documents: how many to show of those that each folder keeps. tokens: of a training, for a mixture's epochs.
    """
    durable.write_bytes(path, page(found, tokenizer, documents, tokens).encode())


def page(
    found: Sequence[Findings],
    tokenizer: tuple[TokenizerInfo, Encoder] | None = None,
    documents: int = 2,
    tokens: float | None = None,
) -> str:
    """The whole page, as HTML."""
    sections = [
        ("funnel", "From the input to what is left", _funnel(found)),
        ("lengths", "Lengths of documents", _lengths(found)),
        ("rules", "What the steps did", _rules(found)),
        ("kept", "Documents that stayed", _kept(found, tokenizer, documents)),
        ("rejected", "Rejected: what could not be read", _rejected(found)),
        ("sources", "Sources", _sources(found)),
        ("mixture", "Mixture", _mixtures(found, tokens)),
        ("tokenizer", "The tokenizer on this text", _tokenizers(found, tokenizer)),
        ("encoder", "The encoder, and how it was checked", _encoders(found)),
        ("jobs", "Jobs, files and checksums", "".join(map(_job, found))),
    ]
    present = [(name, title, body) for name, title, body in sections if body]
    names = ", ".join(text(one.folder) for one in found)
    links = "".join(f'<a href="#{name}">{text(title)}</a>' for name, title, _ in present)
    bodies = "".join(
        f'<section id="{name}">\n<h2>{text(title)}</h2>\n{body}</section>\n' for name, title, body in present
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>Data report: {names}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>Data report</h1>\n<p class="muted">{names}</p>\n{_figures(found)}<nav>{links}</nav>\n{bodies}'
        "<footer>Made by <code>python -m data_prep inspect</code> from the folders&#8217; manifests and the files"
        " beside them; <code>python -m data_prep verify</code> checks every byte of those. 1 kB is 1,000 bytes."
        "</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """`value` escaped, and all of it visible."""
    return html.escape(visible(str(value)))


def _percent(part: float, whole: float) -> str:
    if not whole:
        return "–"
    share = 100 * part / whole
    return f"{share:.2f} %" if share < 9.995 else f"{share:.1f} %"


def _width(part: float, whole: float) -> str:
    return f"{100 * part / whole if whole else 0:.3f}%"


def _bar(parts: Iterable[tuple[str, float]], whole: float, label: str) -> str:
    """Stretches of one bar, side by side: (class, size); `whole` is its full width."""
    rects, start = ['<rect class="track" width="100%" height="100%"/>'], 0.0
    for kind, size in parts:
        if size:
            rects.append(
                f'<rect class="{kind}" x="{_width(start, whole)}" width="{_width(size, whole)}" height="100%"/>'
            )
        start += size
    return f'<svg class="bar" role="img" aria-label="{text(label)}">{"".join(rects)}</svg>'


def _table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], caption: str = "", kind: str = "") -> str:
    """columns: (title, class); rows: cells that are HTML already."""
    head = "".join(f'<th scope="col"{_class(style)}>{text(title)}</th>' for title, style in columns)
    lines = []
    for row in rows:
        cells = (f"<td{_class(style)}>{cell}</td>" for cell, (_, style) in zip(row, columns, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    described = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table{_class(kind)}>{described}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _figures(found: Sequence[Findings]) -> str:
    rows = funnel(found)
    figures: list[tuple[str, str]] = []
    chain = [one for one in found if one.kind in (DOCUMENTS, SHARDS)]
    if rows:
        figures.append((f"{rows[0].documents:,}", "documents in the input" if len(rows) > 1 else "documents"))
        if len(rows) > 1:
            share = _percent(rows[-1].documents, rows[0].documents)
            figures.append((f"{rows[-1].documents:,}", f"documents left, {share} of the input"))
    if chain and chain[0].bytes_read:
        figures.append((human_bytes(chain[0].bytes_read), "of text read"))
    if chain and chain[-1].text_bytes:
        figures.append((human_bytes(chain[-1].text_bytes), "of text left"))
    last = next((one for one in reversed([*found, *chain]) if one.tokens), None)
    if last is not None and last.tokens:
        figures.append((f"{last.tokens:,}", "tokens"))
        if last.text_bytes:
            figures.append((f"{last.text_bytes / last.tokens:.2f}", "bytes a token"))
    if not figures:
        return ""
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for value, name in figures)
    return f'<dl class="figures">{items}</dl>\n'


def _funnel(found: Sequence[Findings]) -> str:
    rows = funnel(found)
    if len(rows) < 2:
        return ""
    whole = max(row.documents + row.removed for row in rows)
    first = rows[0].documents
    lines, folder = [], None
    for row in rows:
        if row.folder != folder and len({row.folder for row in rows}) > 1:
            lines.append(f'<tr class="stage"><td colspan="5">{text(row.folder)}</td></tr>\n')
        folder = row.folder
        label = f"{row.label}: {row.documents:,} documents left, {row.removed:,} removed"
        bar = _bar([("kept", row.documents), ("gone", row.removed)], whole, label)
        lines.append(
            f'<tr data-documents="{row.documents}" data-removed="{row.removed}"><td class="name">{text(row.label)}</td>'
            f'<td class="bar">{bar}</td><td class="number">{row.documents:,}</td>'
            f'<td class="number">{_percent(row.documents, first)}</td>'
            f'<td class="number extra">{f"−{row.removed:,}" if row.removed else ""}</td></tr>\n'
        )
    head = "".join(
        f'<th scope="col"{_class(kind)}>{title}</th>'
        for title, kind in (
            ("after", ""),
            ("documents", ""),
            ("documents", "number"),
            ("of the input", "number"),
            ("removed", "number"),
        )
    )
    notes = "".join(f'<p class="note">{text(gap)}.</p>\n' for gap in gaps(found))
    return (
        '<p class="small muted"><span class="key kept"></span>left after the step<span class="key gone"></span>removed'
        f' by it</p>\n<table class="bars funnel"><thead><tr>{head}</tr></thead>\n<tbody>{"".join(lines)}</tbody>'
        f"</table>\n{notes}"
    )


def _lengths(found: Sequence[Findings]) -> str:
    figures = []
    for one in found:
        read, left = one.lengths.get("read", {}), one.lengths.get("left", {})
        if one.kind == DOCUMENTS and left:
            series = [("read", "as read", read), ("kept", "as left", left)] if read != left else [("kept", "", left)]
            figures.append(_histogram(f"{one.folder}: bytes of a document", series, "bytes (UTF-8)", _binary_bytes))
        if one.kind == SHARDS:
            counts = token_lengths(ShardSet.open(one.folder))
            title = f"{one.folder}: tokens of a document"
            figures.append(_histogram(title, [("kept", "", counts)], "tokens", lambda size: f"{size:,}"))
    return "".join(figures)


def _binary_bytes(size: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size // scale:,} {unit}"
    return f"{size} B"


def _nice_ceiling(value: int) -> int:
    """A round number of at least `value`, with a whole half."""
    if value <= 10:
        return max(2, value + value % 2)
    scale: int = 10 ** (len(str(value)) - 1)
    return next(
        scale * tenths // 10
        for tenths in (12, 14, 16, 18, 20, 24, 30, 40, 50, 60, 80, 100)
        if scale * tenths >= 10 * value
    )


def _anchor(position: int, bins: int) -> str:
    """A label near the right edge ends there, so that it does not stick out of the page."""
    return ' text-anchor="end"' if position > 0.9 * bins else ""


def _histogram(title: str, series: Sequence[tuple[str, str, Mapping[int, int]]], unit: str, tick: Any) -> str:
    """series: (class, name, {bit length: documents}), one drawn over the other."""
    used = [bits for _, _, counts in series for bits in counts]
    low, high = min(used, default=0), max(used, default=0)
    bins = high - low + 1
    top = _nice_ceiling(max((count for _, _, counts in series for count in counts.values()), default=1))
    lines = "".join(f'<line x1="0" x2="100%" y1="{y}" y2="{y}"/>' for y in (0.5, _PLOT_HEIGHT / 2, _PLOT_HEIGHT - 0.5))
    rects = []
    for bits in range(low, high + 1):
        first, last = bin_bounds(bits)
        for index, (kind, name, counts) in enumerate(series):
            count = counts.get(bits, 0)
            height = _PLOT_HEIGHT * count / top
            inset = 0.06 if index == 0 else 0.22
            if count:
                rects.append(
                    f'<rect class="{kind}" x="{_width(bits - low + inset, bins)}" width="{_width(1 - 2 * inset, bins)}"'
                    f' y="{_PLOT_HEIGHT - height:.2f}" height="{height:.2f}"><title>{first:,} to {last:,} {text(unit)}:'
                    f" {count:,} documents{f' {name}' if name else ''}</title></rect>"
                )
    # A label takes about five bins of a narrow screen's plot of twenty.
    every = max(1, math.ceil(bins / 5))
    ticks = "".join(
        f'<text x="{_width(bits - low, bins)}" y="{_PLOT_HEIGHT + 17}"'
        f"{_anchor(bits - low, bins)}>{text(tick(bin_bounds(bits)[0]))}</text>"
        f'<line x1="{_width(bits - low, bins)}" x2="{_width(bits - low, bins)}" y1="{_PLOT_HEIGHT}"'
        f' y2="{_PLOT_HEIGHT + 4}"/>'
        for bits in range(low, high + 1, every)
    )
    keys = "".join(f'<span class="key {kind}"></span>{text(name)}' for kind, name, _ in series if name)
    table = _table(
        [(unit, "number"), *((f"documents {name}".strip(), "number") for _, name, _ in series)],
        [
            [
                "{:,} – {:,}".format(*bin_bounds(bits)),
                *(f"{counts.get(bits, 0):,}" for _, _, counts in series),
            ]
            for bits in range(low, high + 1)
        ],
        kind="narrow",
    )
    return (
        f"<figure><h3>{text(title)}</h3>\n<figcaption>documents by length, in powers of two"
        f'{f"; {keys}" if keys else ""}</figcaption>\n<div class="plot"><div class="y"><span>{top:,}</span>'
        f'<span>{top // 2:,}</span><span>0</span></div><svg role="img" aria-label="{text(title)}" style="height:'
        f'{_PLOT_HEIGHT}px;margin-bottom:1.6rem">{lines}{"".join(rects)}{ticks}</svg><div class="x">{text(unit)}</div>'
        f'</div>\n<details class="plain"><summary>as a table</summary>{table}</details></figure>\n'
    )


def _rules(found: Sequence[Findings]) -> str:
    parts = []
    for one in found:
        for step in one.steps:
            name = f"{one.folder.name}: {step.name}" if len(found) > 1 else step.name
            parts.append(f"<h3>{text(name)}</h3>\n{_step(step)}")
    return "".join(parts)


def _step(step: StepCounts) -> str:
    removed = sum(step.removed.values())
    summary = (
        f"{step.documents:,} documents reached it; {removed:,} ({_percent(removed, step.documents)}) were removed."
    )
    largest = max(step.removed.values(), default=0)
    ordered = sorted(step.removed.items(), key=lambda item: (-item[1], item[0]))
    removals = [_rule(step, reason, count, largest, "gone") for reason, count in ordered if count]
    silent = [reason for reason, count in ordered if not count]
    largest = max(step.changed.values(), default=0)
    changes = [
        _rule(step, what, count, largest, "kept")
        for what, count in sorted(step.changed.items(), key=lambda item: (-item[1], item[0]))
        if count
    ]
    lines = [f'<p class="small muted">{summary}</p>\n', *removals]
    if silent:
        lines.append(f'<p class="note">Removed nothing: {text(", ".join(silent))}.</p>\n')
    if changes:
        lines += ['<p class="note">Documents changed, not removed:</p>\n', *changes]
    if step.kept_samples:
        body = "".join(map(_sample, step.kept_samples[:_SAMPLES_SHOWN]))
        lines.append(
            f'<details class="plain"><summary>documents that it kept, drawn at random</summary>{body}</details>\n'
        )
    if step.details:
        lines.append(f'<details class="plain"><summary>details</summary>{_pairs(step.details)}</details>\n')
    return "".join(lines)


def _rule(step: StepCounts, reason: str, count: int, largest: int, kind: str) -> str:
    samples = step.samples.get(reason, [])[:_SAMPLES_SHOWN]
    bar = _bar([(kind, count)], largest, f"{reason}: {count:,} documents")
    empty = "" if samples else " empty"
    body = "".join(map(_sample, samples))
    shown_of = f'<p class="note">{len(samples):,} of {count:,}, drawn at random.</p>\n' if samples else ""
    return (
        f'<details class="rule{empty}" data-reason="{text(reason)}" data-count="{count}"><summary>'
        f"<span>{_breakable(reason)}"
        f'</span>{bar}<span class="number">{count:,}</span><span class="number muted">{_percent(count, step.documents)}'
        f'</span></summary>\n<div class="samples">{shown_of}{body}</div></details>\n'
    )


def _breakable(name: str) -> str:
    """A long_name.of_parts, escaped, that may be broken between its parts."""
    return text(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def _sample(sample: Mapping[str, Any]) -> str:
    measured, others = measured_of(sample), others_of(sample)
    header = [text(sample.get("place", "")), f"<b>{text(measured)}</b>" if measured else "", text(others)]
    texts = "".join(
        ("" if name == "text" else f'<p class="note">{text(name.replace("_", " "))}</p>') + _pre(content)
        for name, content in texts_of(sample)
    )
    return f'<article class="sample"><header>{" · ".join(filter(None, header))}</header>{texts}</article>\n'


def _pre(content: str) -> str:
    more = len(content) - _SAMPLE_CHARACTERS
    rest = f'<p class="note">… and {more:,} characters more</p>' if more > 0 else ""
    # A first newline in <pre> is dropped by HTML: one is added to be dropped.
    return f'<pre dir="auto">\n{text(content[:_SAMPLE_CHARACTERS])}</pre>{rest}'


def _kept(found: Sequence[Findings], tokenizer: tuple[TokenizerInfo, Encoder] | None, documents: int) -> str:
    parts = []
    for one in found:
        shown_ones = [
            f'<article class="sample"><header>{text(label)}</header>{_pre(content)}</article>\n'
            for label, content in kept_texts(one, documents, tokenizer[1] if tokenizer else None)
        ]
        if shown_ones:
            parts.append(
                f"<details{' open' if one is found[-1] or len(found) == 1 else ''}><summary>{text(one.folder)},"
                f" {len(shown_ones)} documents</summary>{''.join(shown_ones)}</details>\n"
            )
    return "".join(parts)


def _rejected(found: Sequence[Findings]) -> str:
    parts = []
    for one in found:
        if not one.rejected:
            continue
        whole = (one.documents_read or 0) + one.rejected
        rows = [
            [text(category), f"{count:,}", _percent(count, whole)] for category, count in one.rejected_reasons.items()
        ]
        parts.append(f"<h3>{text(one.folder)}</h3>\n")
        parts.append(
            _table([("reason", "name"), ("documents", "number"), ("of the input", "number")], rows, kind="narrow")
        )
        if one.rejected_examples:
            records = [
                [text(record.get("file", "")), text(record.get("line", "")), text(record.get("reason", ""))]
                for record in one.rejected_examples
            ]
            table = _table([("file", "name"), ("line", "number"), ("what was found", "name")], records)
            parts.append(
                f'<details class="plain"><summary>the first {len(records)}, of {text(one.folder / REJECTED_NAME)}'
                f"</summary>{table}</details>\n"
            )
    return "".join(parts)


def _sources(found: Sequence[Findings]) -> str:
    parts = []
    for one in (one for one in found if one.sources):
        sources = sources_shown(one.sources, _SOURCES_SHOWN)
        total, largest = sum(source.tokens for source in sources), max(source.tokens for source in sources)
        rows = [
            [
                text(source.file),
                _bar([("kept", source.tokens)], largest, f"{source.file}: {source.tokens:,} tokens"),
                f"{source.tokens:,}",
                _percent(source.tokens, total),
                f"{source.documents:,}",
                f"{source.tokens / max(1, source.documents):,.0f}",
            ]
            for source in sources
        ]
        columns = [("file", "name"), ("tokens", "bar"), ("tokens", "number"), ("share", "number")]
        columns += [("documents", "number extra"), ("tokens a document", "number extra")]
        parts.append(f"<h3>{text(one.folder)}</h3>\n{_table(columns, rows, kind='bars')}")
    return "".join(parts)


def _mixtures(found: Sequence[Findings], tokens: float | None) -> str:
    parts = []
    for one in (one for one in found if one.kind == mix.KIND):
        mixture = mix.read_mixture(one.folder)
        length = mixture.tokens_once() if tokens is None else tokens
        rows = [
            [
                text(component.name),
                _bar([("kept", component.weight)], 1.0, f"{component.name}: weight {component.weight:.4f}"),
                _percent(component.weight, 1),
                f"{component.tokens:,}",
                f"{component.documents:,}",
                f"{epochs:,.3f}",
            ]
            for component, epochs in zip(mixture.components, mixture.epochs(length), strict=True)
        ]
        columns = [("component", "name"), ("weight: share of the samples", "bar"), ("weight", "number")]
        columns += [("tokens", "number"), ("documents", "number extra"), ("epochs", "number extra")]
        longest = ", the longest that reads nothing twice" if tokens is None else ""
        parts.append(
            f"<h3>{text(one.folder)}</h3>\n{_table(columns, rows, kind='bars')}"
            f'<p class="note">Epochs in a training of {length:,.0f} tokens{longest}.</p>\n'
        )
    return "".join(parts)


def _tokenizers(found: Sequence[Findings], tokenizer: tuple[TokenizerInfo, Encoder] | None) -> str:
    parts = []
    chain = [one for one in found if one.kind in (DOCUMENTS, SHARDS)]
    if tokenizer is not None and chain:
        last = chain[-1]  # what training reads, or what comes nearest
        of_shards = last.kind == SHARDS
        parts.append(
            _fertility(
                fertility_of_shards(last.folder, *tokenizer) if of_shards else fertility_of_documents(last, *tokenizer)
            )
        )
    for one in (one for one in found if one.kind == SHARDS):
        entropy = unigram_entropy(ShardSet.open(one.folder))
        parts.append(
            f'<p class="note">{text(one.folder)}: the tokens&#8217; own frequencies have an entropy of {entropy:.3f}'
            " nats a token, the loss of a model that ignores its context.</p>\n"
        )
    return "".join(parts)


def _fertility(fertility: Fertility) -> str:
    rows = [[text(name), text(value)] for name, value in fertility_rows(fertility)]
    pieces = "".join(
        f'<p class="small muted">{title}</p>\n<p class="pieces">'
        + "".join(f'<span title="{count:,} times">{text(_spaces_shown(piece))}</span>' for piece, count in chosen)
        + "</p>\n"
        for title, chosen in (
            ("Longest pieces that occur", fertility.longest),
            ("Most frequent pieces", fertility.frequent),
        )
    )
    return _table([("measured", ""), ("", "")], rows, kind="narrow") + pieces


def _spaces_shown(piece: str) -> str:
    return piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _encoders(found: Sequence[Findings]) -> str:
    return "".join(
        f"<h3>{text(one.folder)}</h3>\n{_pairs(one.content['encoder'])}"
        for one in found
        if isinstance(one.content.get("encoder"), dict)
    )


def _pairs(values: Mapping[str, Any]) -> str:
    """A table of a nested object, one line a leaf."""
    rows = [[text(name.replace("_", " ")), text(shown(value))] for name, value in _leaves(values)]
    return _table([("", ""), ("", "name")], rows, kind="narrow") if rows else ""


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            leaves += _leaves(value, f"{prefix}{key}: ")
        elif isinstance(value, list):
            leaves.append((f"{prefix}{key}", ", ".join(map(shown, value[:50])) + (", ..." if len(value) > 50 else "")))
        elif value is not None and value != "":
            leaves.append((f"{prefix}{key}", value))
    return leaves


def _job(one: Findings) -> str:
    if one.manifest is None:
        facts = _pairs(foreign_table(ShardSet.open(one.folder)))
        return f"<details><summary>{text(one.folder)}: shards of another program</summary>{facts}</details>\n"
    files = sorted(one.manifest.files.items())
    rows = [
        [text(name), f"{record.bytes:,}", f"<code>{text(record.sha256)}</code>"]
        for name, record in files[:_FILES_SHOWN]
    ]
    table = _table([("file", "name"), ("bytes", "number"), ("sha256", "name")], rows) if rows else ""
    more = ""
    if len(files) > _FILES_SHOWN:
        more = f'<p class="note">{len(files) - _FILES_SHOWN:,} more files in manifest.json.</p>\n'
    options = json.dumps(one.manifest.job, indent=2, ensure_ascii=False)
    size = human_bytes(sum(record.bytes for record in one.manifest.files.values()))
    return (
        f"<details><summary>{text(one.folder)}: {text(one.kind)}, made by {text(one.command)}; {len(files):,} files,"
        f" {size}</summary>\n<pre>\n{text(options)}</pre>\n{table}{more}</details>\n"
    )
