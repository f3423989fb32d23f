"""`python -m pipeline.look`: what a model makes of a text: the loss of each token, and where its heads look."""

import argparse
import io
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep import durable
from data_prep.errors import UserError, exit_status
from pipeline.text_lines import bar, read_lines

if TYPE_CHECKING:
    from pipeline.exported import Exported

EXAMPLES = """\
examples:
  python -m pipeline.look --model exported/demo-gpt --text "Return the mean of the array." --output_dir look
  python -m pipeline.look --model exported/demo-gpt --input text.txt --output_dir look --tensorboard runs/demo-gpt

--output_dir gets index.html (the texts coloured by loss, with the attention maps in it) and attention/*.png, an image a
text and layer. --tensorboard also shows both in that run's TensorBoard, as look/.
"""

_INK = (44, 106, 138)  # of the other pages' bars
_HEAD_PIXELS = 160  # of a head's square, about
_GAP = 4


@dataclass(frozen=True)
class Token:
    """text: what it stands for; "" for a further byte of the character before. loss: in nats. rank: how many tokens
    the model finds likelier, of causal models."""

    text: str
    loss: float
    rank: int | None


@dataclass(frozen=True)
class Looked:
    """What was found of one text. maps: PNG images of the attention, a layer each. attended: tokens that they show,
    those of `frame` (what the model sees around a text) among them."""

    tokens: tuple[Token, ...]
    maps: tuple[bytes, ...]
    attended: int
    frame: tuple[str, ...]

    @property
    def mean_loss(self) -> float | None:
        """In nats a token."""
        return sum(token.loss for token in self.tokens) / len(self.tokens) if self.tokens else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.look",
        description="A page of texts coloured by the loss of their tokens, and maps of the attention.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="H", help="Hugging Face folder of a GPT or BERT")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", nargs="+", metavar="TEXT", help="texts to look at")
    texts.add_argument("--input", metavar="FILE", help="a file that is one text, UTF-8; - is stdin")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --output_dir if it is such a page")
    parser.add_argument(
        "--attention_tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens at the beginning of a text whose attention is shown; 0: none (default: %(default)s)",
    )
    parser.add_argument("--tensorboard", type=Path, metavar="RUN", help="a run, whose TensorBoard shows it too")
    return parser


def look_at(exported: "Exported", text: str, attention_tokens: int) -> Looked:
    """The losses of a text's tokens in float32 or what the model computes in, and its attention maps."""
    from pipeline.likelihood import frame, pseudo_log_likelihood, token_log_probabilities

    special = exported.tokenizer.special
    ids = exported.encoder.encode_batch([text])[0]
    ranks: list[int | None]
    before: list[int]
    after: list[int] = []
    if exported.objective == "causal":
        (scores,) = token_log_probabilities(exported.model, [ids], special.end_of_document)
        log_probabilities, ranks = scores.log_probabilities, list(scores.ranks.tolist())
        before = [special.end_of_document]
    else:
        (log_probabilities,) = pseudo_log_likelihood(exported.model, [ids], special)
        ranks = [None] * len(ids)
        before, after = frame(special)
    pieces = texts_of_tokens(text, exported.encoder.token_starts(text))
    tokens = tuple(
        Token(piece, -float(found), rank) for piece, found, rank in zip(pieces, log_probabilities, ranks, strict=True)
    )
    maps: tuple[bytes, ...] = ()
    shown = [*before, *ids[: max(0, attention_tokens - len(before) - len(after))].tolist(), *after]
    if attention_tokens > 0 and shown:
        maps = tuple(as_png(heads) for heads in attention_of(exported.model, shown))
    around = tuple(exported.encoder.decode([one]) for one in (*before, *after))
    return Looked(tokens, maps, len(shown), around)


def texts_of_tokens(text: str, starts: NDArray[np.int64]) -> list[str]:
    """The stretch of `text` that each token stands for; together they are the text.

    starts: where each token begins, in characters. Tokens that are bytes of one character begin together: the first has
    it. What stands before the first token, and between tokens, belongs to the one before or, at the beginning, to the
    first.
    """
    edges = [0, *starts[1:].tolist(), len(text)] if len(starts) else []
    pieces = [text[begin:end] for begin, end in itertools.pairwise(edges)]
    # Of tokens with one start the last has the stretch so far; it moves to the first of them.
    for index in range(len(pieces) - 1, 0, -1):
        if not pieces[index - 1] and starts[index - 1] == starts[index]:
            pieces[index - 1], pieces[index] = pieces[index], ""
    return pieces


def attention_of(model: Any, ids: Sequence[int]) -> list[NDArray[np.float32]]:
    """How much each token looks at each [heads, tokens, tokens], of each layer; rows add up to 1. The model computes
    its attention step by step from here on ("eager"). Raises UserError when it gives no such numbers."""
    import torch

    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=torch.tensor([list(ids)], device=model.device), output_attentions=True)
    found = [layer[0].float().cpu().numpy() for layer in output.attentions or () if layer is not None]
    if not found:
        raise UserError(f"a {model.config.model_type} model does not tell its attention; give --attention_tokens 0")
    return found


def as_png(heads: NDArray[np.float32]) -> bytes:
    """An image of a layer's heads [heads, tokens, tokens], squares side by side: white is 0, the ink 1, by the square
    root."""
    from PIL import Image  # TensorBoard brings it

    count, tokens, _ = heads.shape
    columns = math.ceil(math.sqrt(count))
    rows, scale = -(-count // columns), max(1, _HEAD_PIXELS // tokens)
    size = tokens * scale + _GAP
    image = np.full((rows * size + _GAP, columns * size + _GAP, 3), 128, dtype=np.uint8)
    for head, values in enumerate(heads):
        share = np.sqrt(np.clip(values, 0, 1))[..., None]
        square = np.rint(255 + share * (np.array(_INK) - 255)).astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
        top, left = head // columns * size + _GAP, head % columns * size + _GAP
        image[top : top + tokens * scale, left : left + tokens * scale] = square
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def write_folder(folder: Path, model: str, objective: str, found: Sequence[Looked], *, overwrite: bool) -> None:
    """Raises UserError when something stands there that is not to be replaced."""
    from pipeline.look_page import page

    if overwrite and folder.exists() and any(folder.iterdir()) and not (folder / "index.html").exists():
        raise UserError(f"--overwrite: {folder} holds something else (no index.html); remove it yourself")
    try:
        with durable.replacing_folder(folder, overwrite=overwrite) as temporary:
            durable.write_bytes(temporary / "index.html", page(model, objective, found).encode())
            for number, looked in enumerate(found, 1):
                for layer, png in enumerate(looked.maps, 1):
                    durable.write_bytes(temporary / "attention" / f"text{number}_layer{layer:02}.png", png)
    except FileExistsError:
        raise UserError(f"--output_dir {folder} is not empty; give another folder or --overwrite") from None


def show_in_tensorboard(run_dir: Path, found: Sequence[Looked]) -> Path:
    """Writes the losses as text and the maps as images; returns the folder of the events."""
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    folder = run_dir / "tensorboard" / "look"
    with SummaryWriter(str(folder)) as writer:
        for number, looked in enumerate(found, 1):
            rows = "\n".join(
                f"| {_cell(token.text)} | {token.loss:.3f} | {'' if token.rank is None else token.rank + 1} |"
                for token in looked.tokens
            )
            writer.add_text(f"look/text_{number}", f"| token | loss (nats) | choice |\n|---|---|---|\n{rows}", 0)
            for layer, png in enumerate(looked.maps, 1):
                pixels = np.asarray(Image.open(io.BytesIO(png)))
                writer.add_image(f"look/text_{number}/attention_layer_{layer:02}", pixels, 0, dataformats="HWC")
    return folder


def _cell(text: str) -> str:
    """A token in a table of Markdown's, which takes no code with these signs in it."""
    shown = text.replace("\n", "↵").replace("|", "¦").replace("`", "'")
    return f"`{shown}`" if shown.strip() else f"`{'␣' * max(1, len(shown))}`"


def look(arguments: argparse.Namespace) -> int:
    from pipeline.exported import load_exported, objective_of

    objective_of(arguments.model)
    if arguments.attention_tokens < 0:
        raise UserError(f"--attention_tokens is {arguments.attention_tokens}, expected 0 or more")
    if arguments.tensorboard is not None and not (arguments.tensorboard / "tensorboard").is_dir():
        raise UserError(f"--tensorboard {arguments.tensorboard} is no run: it has no folder tensorboard/")
    texts = arguments.text if arguments.text is not None else ["\n".join(read_lines(arguments.input))]
    exported = load_exported(arguments.model, dtype="fp32")
    with bar("look", "text", len(texts)) as progress:
        found = []
        for text in texts:
            found.append(look_at(exported, text, arguments.attention_tokens))
            progress.update()
    write_folder(arguments.output_dir, str(arguments.model), exported.objective, found, overwrite=arguments.overwrite)
    for number, looked in enumerate(found, 1):
        loss = "" if looked.mean_loss is None else f", {looked.mean_loss:.4f} nats a token"
        print(f"text {number}: {len(looked.tokens):,} tokens{loss}")
    print(f"{arguments.output_dir / 'index.html'}: the texts by loss, and {sum(len(one.maps) for one in found)} maps")
    if arguments.tensorboard is not None:
        folder = show_in_tensorboard(arguments.tensorboard, found)
        print(f"{folder}: the same; tensorboard --logdir {arguments.tensorboard}")
    return 0


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    return exit_status(lambda: look(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
