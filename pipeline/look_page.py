"""What `pipeline.look` has found as one HTML page that needs nothing but a browser: style and images are inline, there
is no script, and a content security policy forbids both scripts and addresses."""

import base64
import html
import math
from collections.abc import Sequence

from data_prep.findings import visible
from pipeline.look import Looked, Token

_FULL_COLOUR = 10.0  # nats: one in 22,000

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --ink: #1b1d20; --muted: #62666c; --rule: #dededa;
  --loss: 194, 90, 53; }
@media (prefers-color-scheme: dark) { :root { --paper: #141619; --ink: #e4e4e0; --muted: #9ba0a6; --rule: #30343a;
  --loss: 226, 138, 99; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; font-weight: 650; margin: 3rem 0 .3rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
p { margin: .2rem 0 1rem; max-width: 46rem; }
.muted, figcaption { color: var(--muted); font-size: .86rem; }
.text { font: .95rem/2 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 1rem 0; }
.text span { background: rgba(var(--loss), var(--share)); border-radius: 2px; padding: .12rem 0;
  border-right: 1px solid var(--paper); }
.scale { display: inline-flex; margin: 0 .4rem; vertical-align: -.15rem; }
.scale i { width: 1.4rem; height: 1rem; background: rgba(var(--loss), var(--share)); }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; } img { width: 100%; image-rendering: pixelated; border: 1px solid var(--rule); }
"""


def page(model: str, objective: str, found: Sequence[Looked]) -> str:
    """The whole page, as HTML."""
    what = (
        "how surprised the model is by each token after those before it"
        if objective == "causal"
        else "how surprised the model is by each token among all others (pseudo-likelihood)"
    )
    scale = "".join(f'<i style="--share:{share / 10:.1f}"></i>' for share in range(0, 11, 2))
    sections = "".join(_section(number, looked) for number, looked in enumerate(found, 1))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src"
        ' data:">\n'
        f"<title>{html.escape(visible(model))}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(visible(model))}</h1>\n"
        f'<p class="muted">The colour is the loss: {what}. 0<span class="scale">{scale}</span>{_FULL_COLOUR:g} nats and'
        f" more. Point at a token for its numbers.</p>\n{sections}</main>\n</body>\n</html>\n"
    )


def _section(number: int, looked: Looked) -> str:
    tokens = "".join(map(_token, looked.tokens))
    mean = looked.mean_loss
    summary = "no tokens"
    if mean is not None:
        summary = f"{len(looked.tokens):,} tokens, {mean:.3f} nats a token, perplexity {math.exp(min(mean, 700)):,.1f}"
    maps = "".join(
        f'<figure><img alt="attention of layer {layer}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>layer {layer}</figcaption></figure>\n"
        for layer, png in enumerate(looked.maps, 1)
    )
    attention = ""
    if maps:
        attention = (
            f'<p class="muted">Attention of the first {looked.attended} tokens, '
            f"{html.escape(', '.join(map(repr, looked.frame)))} among them: a square a head, from left to right and top"
            " to bottom; a row of it is a token, and the darker a place, the more it looks at the token of that column"
            f' (the square root is shown).</p>\n<div class="maps">{maps}</div>\n'
        )
    return f'<h2>Text {number}</h2>\n<p class="muted">{summary}</p>\n<div class="text">{tokens}</div>\n{attention}'


def _token(token: Token) -> str:
    share = min(1.0, token.loss / _FULL_COLOUR)
    rank = "" if token.rank is None else f", the model's choice {token.rank + 1}"
    about = f"{token.loss:.3f} nats, probability {math.exp(-token.loss):.2%}{rank}"
    # A line's end stays one, behind a sign of it; bytes of a character begun before are one place.
    shown = "·" if not token.text else "\n".join(map(visible, token.text.split("\n"))).replace("\n", "↵\n")
    return f'<span style="--share:{share:.3f}" title="{html.escape(about)}">{html.escape(shown)}</span>'
