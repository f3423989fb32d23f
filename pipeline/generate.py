"""`python -m pipeline.generate`: text from an exported GPT.

transformers' `generate` with its key-value cache does the work. A prompt begins behind the end of a document, as every
text does in training.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.encoding import TOKENIZER_FILE, vocabulary_of
from data_prep.errors import UserError, exit_status
from pipeline.text_lines import read_lines

if TYPE_CHECKING:
    import torch

    from pipeline.exported import Exported

EXAMPLES = """\
examples:
  python -m pipeline.generate --model exported/demo-gpt --prompt "Return the mean of"
  python -m pipeline.generate --model exported/demo-gpt --prompt "Parameters" --temperature 0 --max_new_tokens 50
  python -m pipeline.generate --model exported/demo-gpt --prompt_file prompts.txt --num_samples 3 --json
  python -m pipeline.generate --model exported/demo-gpt --prompt "def mean(" --stop $'\\n\\n'
  python -m pipeline.generate --model exported/demo-gpt          prompts from the terminal; Ctrl-D ends

A prompt is continued as the beginning of a document. --json prints an object for each text: prompt, sample, text (the
continuation), tokens, and finish: "end" (of the document), "stop" (a --stop string, which is cut off) or "length".
"""

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_TAIL_TOKENS = 8  # beyond a token a byte of the longest stop string, for what one character needs


@dataclass(frozen=True)
class Settings:
    """How texts are continued; temperature 0 is greedy, top_k 0 and top_p 1 leave all tokens. stop: strings that end a
    text. batch_size: texts that are made together."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    num_samples: int = 1
    stop: tuple[str, ...] = ()
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, up to 1"),
            ("num_samples", self.num_samples >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("stop", all(self.stop), "strings that are not empty"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise UserError(f"--{name} is {getattr(self, name)}, expected {expected}")
        if self.temperature == 0 and self.num_samples > 1:
            raise UserError(f"--num_samples is {self.num_samples}, but without --temperature all would be the same")

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of transformers' generate."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


@dataclass(frozen=True)
class Continuation:
    """text: without the prompt. tokens: that were made. finish: "end", "stop" or "length"."""

    text: str
    tokens: int
    finish: str


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.generate",
        description="Continue prompts with an exported causal model; a single text streams to the terminal.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="H", help="Hugging Face folder of a causal model")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to continue (default: ask for them)")
    prompts.add_argument("--prompt_file", metavar="FILE", help="a prompt a line, UTF-8; - is stdin")
    for name, kind, metavar, text in (
        ("max_new_tokens", int, "N", "tokens to add at most"),
        ("temperature", float, "T", "0 takes the likeliest token (greedy)"),
        ("top_k", int, "K", "sample from the K likeliest; 0: from all"),
        ("top_p", float, "P", "and from the likeliest that have this share of the probability"),
        ("num_samples", int, "N", "texts a prompt"),
        ("batch_size", int, "N", "texts made together"),
    ):
        help_text = f"{text} (default: {getattr(defaults, name)})"
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name), metavar=metavar, help=help_text)
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="end a text before any of these strings")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of the sampling (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="precision of the computation; auto: the weights' (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="JSON lines instead of text")
    return parser


def continuations(
    exported: "Exported",
    prompts: Sequence[str],
    settings: Settings,
    stream: Callable[[str], object] | None = None,
) -> Iterator[tuple[int, list[Continuation]]]:
    """(number of the prompt, its texts) as they are done, in any order. stream: given new text of the only one.

    Prompts that are made together are filled up on the left, which changes nothing but rounding. Raises UserError
    before anything is made for a prompt that leaves no position of the model free.
    """
    from pipeline.model import longest_input

    start, positions = exported.tokenizer.special.end_of_document, longest_input(exported.model.config)
    encoded = [[start, *ids.tolist()] for ids in exported.encoder.encode_batch(list(prompts))]
    for number, ids in enumerate(encoded):
        if len(ids) >= positions:
            raise UserError(
                f"prompt {number + 1} has {len(ids)} tokens with the start of the document, the model {positions}"
                " positions; shorten it"
            )
    # Together are prompts that may grow by equally many tokens, so that no text depends on its neighbours.
    rooms = [min(settings.max_new_tokens, positions - len(ids)) for ids in encoded]
    order = sorted(range(len(encoded)), key=lambda number: (-rooms[number], len(encoded[number])))
    size = max(1, settings.batch_size // settings.num_samples)
    while order:
        batch = [number for number in order[:size] if rooms[number] == rooms[order[0]]]
        order = order[len(batch) :]
        made = _generated(exported, [encoded[number] for number in batch], rooms[batch[0]], settings, stream)
        for number, texts in zip(batch, made, strict=True):
            yield number, texts


def _generated(
    exported: "Exported",
    prompts: list[list[int]],
    new_tokens: int,
    settings: Settings,
    stream: Callable[[str], object] | None,
) -> list[list[Continuation]]:
    """The texts of each prompt (ids) of one batch."""
    import torch

    special, model = exported.tokenizer.special, exported.model
    width, padding = max(map(len, prompts)), special.padding if special.padding is not None else special.end_of_document
    rows = [[padding] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    reader = TextReader(exported, prompts, settings)
    options: dict[str, Any] = {}
    if settings.stop:
        options["stopping_criteria"] = [reader.stopped]
    if stream is not None:
        options["streamer"] = Streamer(reader, _byte_ids(exported.folder), stream)
    with torch.inference_mode():  # generate's own no_grad takes 4 % longer on a small model
        output = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=new_tokens,
            num_return_sequences=settings.num_samples,
            eos_token_id=special.end_of_document,
            pad_token_id=padding,
            **settings.sampling,
            **options,
        )
    made = [reader.continuation(row, ids[width:]) for row, ids in enumerate(output.tolist())]
    return [made[first : first + settings.num_samples] for first in range(0, len(made), settings.num_samples)]


def _byte_ids(tokenizer: Path) -> set[int]:
    """Ids of sentencepiece's pieces for single bytes."""
    vocabulary = vocabulary_of(json.loads((tokenizer / TOKENIZER_FILE).read_bytes()))
    return {token for piece, token in vocabulary.items() if _BYTE.fullmatch(piece)}


class TextReader:
    """The text of the rows of one call of `generate`: what follows each prompt, up to its end."""

    def __init__(self, exported: "Exported", prompts: list[list[int]], settings: Settings) -> None:
        self._encoder, self._end = exported.encoder, exported.tokenizer.special.end_of_document
        tails = [ids[1:][-_TAIL_TOKENS:] for ids in prompts]
        shown = [(tail, len(self._encoder.decode(tail))) for tail in tails]
        self._prompts = [one for one in shown for _ in range(settings.num_samples)]
        self._width = max(map(len, prompts))
        self.stop = settings.stop
        self._tail = _TAIL_TOKENS + max((len(stop.encode()) for stop in self.stop), default=0)

    def text_after_prompt(self, row: int, new: Sequence[int]) -> str:
        """Decoded behind the prompt, whose last tokens may share a character or a space with the new ones."""
        prompt, characters = self._prompts[row]
        return self._encoder.decode([*prompt, *new])[characters:]

    def cut(self, text: str) -> str:
        """Up to the first of the stop strings."""
        return text[: min((found for stop in self.stop if (found := text.find(stop)) >= 0), default=len(text))]

    def continuation(self, row: int, new: Sequence[int]) -> Continuation:
        ended = self._end in new
        ids = list(new[: new.index(self._end)] if ended else new)
        text = self.text_after_prompt(row, ids)
        kept = self.cut(text)
        if len(kept) < len(text):
            # A row that has stopped is filled up while others go on.
            while self.cut(self.text_after_prompt(row, ids[:-1])) != self.text_after_prompt(row, ids[:-1]):
                ids.pop()
            return Continuation(kept, len(ids), "stop")
        return Continuation(text, len(ids), "end" if ended else "length")

    def stopped(self, input_ids: "torch.Tensor", scores: Any, **_: Any) -> "torch.Tensor":
        """A stopping criterion of transformers: whether the last tokens of each row have completed a stop string."""
        import torch

        new = input_ids[:, self._width :].tolist()
        found = []
        for row, ids in enumerate(new):
            earlier = ids[: -self._tail]
            text = self.text_after_prompt(row, ids) if not earlier else self._encoder.decode(ids[-self._tail :])
            found.append(len(self.cut(text)) < len(text))
        return torch.tensor(found, device=input_ids.device)


class Streamer:
    """transformers' streamer of a single text: hands on what is certain to stay, neither the beginning of a stop string
    nor bytes that may still turn out to be no character, or part of one.

    byte_ids: of tokens that are a byte each; what a run of them is shows when it is over.
    """

    def __init__(self, reader: TextReader, byte_ids: Collection[int], write: Callable[[str], object]) -> None:
        self._reader, self._byte_ids, self._write = reader, byte_ids, write
        self._ids: list[int] | None = None
        self._written = 0

    def put(self, value: "torch.Tensor") -> None:
        if self._ids is None:  # the first call brings the prompt
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        settled = next((end for end in range(len(self._ids), 0, -1) if self._ids[end - 1] not in self._byte_ids), 0)
        text = self._reader.continuation(0, self._ids[:settled]).text
        held = max((self._begun(text, stop) for stop in self._reader.stop), default=0)
        sure = text[: len(text) - held].rstrip("\ufffd")
        self._write(sure[self._written :])
        self._written = max(self._written, len(sure))

    def end(self) -> None:
        assert self._ids is not None
        self._write(self._reader.continuation(0, self._ids).text[self._written :])

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """Characters at the end of `text` that may be the beginning of `stop`."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def _show_all(exported: "Exported", prompts: Sequence[str], settings: Settings, *, as_json: bool) -> None:
    """Prints the texts of all prompts in their order; the only one as it is made."""
    if len(prompts) == settings.num_samples == 1 and not as_json:
        before = iter(prompts)  # shown when it is known to fit
        list(
            continuations(exported, prompts, settings, lambda text: print(next(before, "") + text, end="", flush=True))
        )
        print()
        return
    done: dict[int, list[Continuation]] = {}
    shown = 0
    for number, texts in continuations(exported, prompts, settings):
        done[number] = texts
        while shown in done:
            for sample, found in enumerate(done.pop(shown)):
                if as_json:
                    values = {"prompt": prompts[shown], "sample": sample, **vars(found)}
                    print(json.dumps(values, ensure_ascii=False), flush=True)
                else:
                    print(f"--- prompt {shown + 1}, text {sample + 1}\n{prompts[shown]}{found.text}", flush=True)
            shown += 1


def _converse(exported: "Exported", settings: Settings) -> None:
    """Asks for prompts and continues them; Ctrl-C ends a text, Ctrl-D the conversation."""
    import contextlib
    import readline  # noqa: F401 - `input` then has a history and edits lines

    print("a prompt a line; Ctrl-C ends a text, Ctrl-D all", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        if prompt:
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    _show_all(exported, [prompt], replace(settings, num_samples=1), as_json=False)
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)


def generate(arguments: argparse.Namespace) -> int:
    from pipeline.exported import load_exported, objective_of

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "num_samples", "batch_size")
    settings = Settings(**{name: getattr(arguments, name) for name in names}, stop=tuple(arguments.stop))
    objective_of(arguments.model, "causal")
    prompts = arguments.prompt
    if arguments.prompt_file is not None:
        prompts = list(read_lines(arguments.prompt_file))
        if not prompts:
            raise UserError(f"--prompt_file {arguments.prompt_file} is empty")
    if prompts is None and not sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT, --prompt_file FILE (- for stdin), or start this in a terminal")
    exported = load_exported(arguments.model, "causal", arguments.dtype)

    import torch

    torch.manual_seed(arguments.seed)
    if prompts is None:
        _converse(exported, settings)
    else:
        _show_all(exported, prompts, settings, as_json=arguments.json)
    return 0


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    return exit_status(lambda: generate(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
