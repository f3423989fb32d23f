"""Stage train_tokenizer: a BPE, unigram or WordPiece vocabulary of our own, as a Hugging Face tokenizer folder.

BPE and unigram are trained by sentencepiece (Kudo & Richardson 2018, arXiv:1808.06226; unigram: Kudo 2018,
arXiv:1804.10959; BPE: Sennrich et al. 2016, arXiv:1508.07909) without normalization and with byte fallback, and
converted to a `tokenizer.json` that gives the same ids. WordPiece (Devlin et al. 2019, arXiv:1810.04805) is trained
by `tokenizers`.

decode(encode(x)) == x holds for BPE and unigram for every text but two kinds: U+2581, sentencepiece's own mark for
a space, comes back as a space, and lone surrogates are not text. WordPiece loses spaces, and case where lowercased.

Every tokenizer carries the special tokens of both objectives, first in the vocabulary, and those of --special_tokens
behind them; text never yields one.
"""

import argparse
import io
import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from data_prep import documents, durable, encoding, parts
from data_prep.errors import UserError
from data_prep.manifest import FileRecord, Manifest, is_current, read_manifest

SUMMARY = "train a BPE, unigram or WordPiece tokenizer on a sample of documents"
EXAMPLES = """\
  python -m data_prep train_tokenizer --input 'data/clean/*.jsonl' --output_dir data/tokenizer \\
      --type bpe --vocab_size 32000
  python -m data_prep train_tokenizer --input 'data/clean/*.jsonl' --output_dir data/bert_tokenizer \\
      --type wordpiece --vocab_size 30522 --no-lowercase
  python -m data_prep train_tokenizer --input 'data/code/*.jsonl' --output_dir data/code_tokenizer \\
      --type bpe --vocab_size 32000 --special_tokens '<|fim_prefix|>' '<|fim_middle|>' '<|fim_suffix|>'
"""

TYPES = ("bpe", "unigram", "wordpiece")
MODEL_FILE = "tokenizer.model"
SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "eos_token": "<|endoftext|>",
}
"""Role in tokenizer_config.json -> token; the order is that of the ids, from 0."""

# No piece is like that, so that text never yields such a token: sentencepiece's pieces keep to one script, BERT cuts at
# punctuation, and each of its characters is a piece (`convert_sentencepiece` counts on it).
_FURTHER_SPECIAL_TOKEN = re.compile(r"[<\[][!-~]*[A-Za-z][!-~]*[>\]]")
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's pieces for single bytes

_SPACE = "\u2581"  # sentencepiece's mark for a space
_SKIPPED_BY_SENTENCEPIECE = "\u2585"  # its mark for unknown text: it drops a training sentence that holds one
_PRINTABLE_ASCII = "".join(map(chr, range(33, 127)))
_CHARACTER_COVERAGE = 0.9995  # sentencepiece's default; rarer characters are left to bytes ([UNK] in WordPiece)
_CHUNK_CHARACTERS = 4000
_MAX_SENTENCE_BYTES = 4 * _CHUNK_CHARACTERS + 4  # UTF-8 takes at most 4 bytes a character
_TRAINING_THREADS = 8  # fixed, not the cores there are: unigram's sums, so its ties, depend on it
_SCORE_STEP = 2.0**-6
_PART_BYTES = 1 << 20
_MIN_QUOTA_BYTES = 1 << 18
_HELD_OUT_EVERY = 50
_HELD_OUT_CHARACTERS = 200_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    documents.add_input_arguments(parser, parts=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--type", choices=TYPES, required=True, help="kind of tokenizer")
    parser.add_argument(
        "--vocab_size", type=int, required=True, help="entries of the vocabulary, special tokens included"
    )
    parser.add_argument(
        "--max_megabytes",
        type=float,
        default=50.0,
        help="text to train on, in MB (10^6 bytes): a sample spread over all the input (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of that sample (default: %(default)s)")
    parser.add_argument(
        "--lowercase",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wordpiece: lowercase and strip accents, as bert-base-uncased (default: %(default)s)",
    )
    parser.add_argument(
        "--special_tokens",
        nargs="+",
        metavar="TOKEN",
        default=[],
        help="more special tokens, such as '<|fim_prefix|>', behind the six that every tokenizer has (default: none)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another tokenizer in --output_dir")


def main(arguments: argparse.Namespace) -> None:
    """Trains, converts, checks and writes the tokenizer, or says that it is there already.

    Raises UserError for bad options or input, a corpus that does not support the vocabulary, and an output folder
    that holds something else.
    """
    started = time.monotonic()
    folder: Path = arguments.output_dir
    if arguments.vocab_size < 1:
        raise UserError(f"--vocab_size {arguments.vocab_size}: expected a positive number")
    if not 0 < arguments.max_megabytes < float("inf"):
        raise UserError(f"--max_megabytes {arguments.max_megabytes}: expected a positive number")
    _check_special_tokens(arguments.special_tokens)
    reading = replace(documents.ReadOptions.of(arguments), part_bytes=_PART_BYTES)
    input_parts = documents.list_parts(arguments.input, reading)
    names = ("type", "vocab_size", "input", "text_field", "max_megabytes", "seed")
    job = {"command": "train_tokenizer"} | {name: getattr(arguments, name) for name in names}
    if arguments.type == "wordpiece":
        job["lowercase"] = arguments.lowercase
    if arguments.special_tokens:  # left out, a tokenizer that was made before there was the flag stays up to date
        job["special_tokens"] = arguments.special_tokens
    job["input_bytes"] = sum(part.bytes for part in input_parts)
    if is_current(folder, job, documents.find_inputs(arguments.input)):
        print(f"{folder} is up to date")
        return
    _check_output(folder, arguments.overwrite)

    sample = sample_texts(input_parts, reading, max_bytes=int(arguments.max_megabytes * 1e6), seed=arguments.seed)
    training, held_out = split_held_out(sample)
    trained_on = {"documents": len(training), "bytes": sum(len(text.encode()) for text in training)}
    print(
        f"training a {arguments.type} of {arguments.vocab_size} pieces on {_described(trained_on)} ...",
        flush=True,
    )
    if arguments.type == "wordpiece":
        model = None
        tokenizer = train_wordpiece(training, arguments.vocab_size, arguments.lowercase, arguments.special_tokens)
    else:
        model = train_sentencepiece(training, arguments.type, arguments.vocab_size, arguments.special_tokens)
        tokenizer = convert_sentencepiece(model)
        check_conversion(model, tokenizer, held_out)

    _write(folder, tokenizer, model, job, trained_on)
    size = sum(len(text.encode()) for text in held_out)
    tokens = sum(map(len, encoding.Encoder(folder).encode_batch(held_out)))
    print(
        f"{folder}: {arguments.type}, vocabulary {arguments.vocab_size}, trained on {_described(trained_on)},"
        f" {size / max(tokens, 1):.2f} bytes a token on {size / 1e3:.0f} kB"
        f" {'held out' if len(training) < len(sample) else 'of them'}, {time.monotonic() - started:.1f} s"
    )


def _check_special_tokens(tokens: list[str]) -> None:
    """Raises UserError for a token that cannot be a further special one."""
    for token in tokens:
        if token in SPECIAL_TOKENS.values():
            raise UserError(f"--special_tokens {token!r}: every tokenizer has it already; leave it out")
        if tokens.count(token) > 1:
            raise UserError(f"--special_tokens {token!r} is given twice; give it once")
        if not _FURTHER_SPECIAL_TOKEN.fullmatch(token) or _BYTE.fullmatch(token):
            raise UserError(
                f"--special_tokens {token!r}: expected printable ASCII in angle or square brackets, with a letter and"
                " without spaces, such as '<|fim_prefix|>' ('<0x41>' and its like are bytes)"
            )


def sample_texts(
    input_parts: list[documents.Part], reading: documents.ReadOptions, *, max_bytes: int, seed: int
) -> list[str]:
    """At most `max_bytes` bytes of UTF-8 text, spread over all the parts; the same for the same parts and seed.

    All of it where the input is no larger. Otherwise every part gives the start of itself: its share of `max_bytes`
    or 256 KiB, whichever is more, in an order drawn from the seed, until `max_bytes` are reached.

    Raises UserError when there is no text at all, and OSError as `documents.read_batches` does.
    """
    total = sum(part.bytes for part in input_parts)
    everything = total <= max_bytes
    order = list(input_parts)
    if not everything:
        random.Random(seed).shuffle(order)
    texts: list[str] = []
    taken = 0
    with parts.progress_bar("reading", min(total, max_bytes)) as bar:
        for part in order:
            quota = max_bytes - taken
            if not everything:
                quota = min(quota, max(max_bytes * part.bytes // total, _MIN_QUOTA_BYTES))
            for text in documents.read_texts(part, reading):
                raw = text.encode()[:quota]
                # A document that the quota cuts inside a character loses that character.
                if kept := raw.decode("utf-8", "ignore"):
                    texts.append(kept)
                taken += len(raw)
                quota -= len(raw)
                bar.update(len(raw))
                if quota <= 0:
                    break
            if taken >= max_bytes:
                break
    if not any(text.strip() for text in texts):
        raise UserError("--input holds no text: expected at least one document that is not blank")
    return texts


def split_held_out(texts: list[str]) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts): every 50th text, up to 200,000 characters, is held out.

    Of fewer than 50 texts none is spared: the held-out ones are then the first of the training texts.
    """
    spared = texts[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    held_out: list[str] = []
    room = _HELD_OUT_CHARACTERS
    for text in spared or texts:
        if room <= 0:
            break
        held_out.append(text[:room])
        room -= len(text)
    if not spared:
        return texts, held_out
    last = len(held_out) * _HELD_OUT_EVERY
    return [text for i, text in enumerate(texts) if i >= last or (i + 1) % _HELD_OUT_EVERY], held_out


def alphabet_of(texts: list[str]) -> set[str]:
    """The most frequent characters that make up 99.95 % of the texts, and printable ASCII."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    wanted = _CHARACTER_COVERAGE * counts.total()
    alphabet = set(_PRINTABLE_ASCII)
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if wanted <= 0:
            break
        alphabet.add(character)
        wanted -= count
    return alphabet


def train_sentencepiece(texts: list[str], model_type: str, vocab_size: int, further: Sequence[str] = ()) -> bytes:
    """Trains a "bpe" or "unigram" and returns sentencepiece's serialized model.

    further: special tokens behind those of `SPECIAL_TOKENS`.
    Raises UserError when the texts do not support exactly `vocab_size` pieces, naming the bound.
    """
    import sentencepiece

    alphabet = alphabet_of(texts)
    # sentencepiece's own coverage and required_chars take fewer or more characters, depending on whether there are
    # spaces (0.2.3), so we leave the rare ones out here and let it see every printable one.
    rare = {ord(c): " " for text in texts for c in set(text) - alphabet} | {ord(_SKIPPED_BY_SENTENCEPIECE): " "}
    unknown, padding, *controls = *SPECIAL_TOKENS.values(), *further
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(
                [" ".join(_PRINTABLE_ASCII)],
                (chunk for text in texts for chunk in _chunks(text.translate(rare))),
            ),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=1.0,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            num_threads=_TRAINING_THREADS,
            unk_id=0,
            unk_piece=unknown,
            pad_id=1,
            pad_piece=padding,
            bos_id=-1,
            eos_id=-1,
            control_symbols=controls,
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"too high.*<= (\d+)", str(error)):
            raise _unsupported(model_type, vocab_size, f"at most {found[1]}") from None
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise _unsupported(model_type, vocab_size, f"at least {found[1]}") from None
        raise
    return _with_stepped_scores(model.getvalue()) if model_type == "unigram" else model.getvalue()


def _unsupported(model_type: str, vocab_size: int, bound: str) -> UserError:
    more = ", or give more text" if bound.startswith("at most") else ""
    return UserError(f"--vocab_size {vocab_size}: this text supports {bound} for a {model_type}; give that{more}")


def _chunks(text: str) -> Iterator[str]:
    """Cuts `text` into pieces of at most 4,000 characters, before a newline or else a space where there is one."""
    start = 0
    while len(text) - start > _CHUNK_CHARACTERS:
        end = start + _CHUNK_CHARACTERS
        cut = max(text.rfind("\n", start + 1, end), text.rfind(" ", start + 1, end))
        cut = cut if cut > start else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _with_stepped_scores(model: bytes) -> bytes:
    """Rounds a unigram's scores to multiples of 1/64 nat, at most 0.8 % of a piece's probability.

    Sums of such scores are exact: in float64, which `tokenizers` adds in, for a text of any length; in float32,
    which sentencepiece adds in, up to 2^24 / 64 nats (about 100 kB of text). So both find the same segmentation,
    the same among equals, and a document's ids are those of its words. With the scores as trained, rounding decides
    between "####" + "##" and "##" + "####": 8 of 150 source files then differed.
    """
    proto = _parsed(model)
    for piece in proto.pieces:
        piece.score = round(piece.score / _SCORE_STEP) * _SCORE_STEP
    return bytes(proto.SerializeToString(deterministic=True))


def _parsed(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at import
    proto.ParseFromString(model)
    return proto


def convert_sentencepiece(model: bytes) -> Tokenizer:
    """The `tokenizers` form of a model of `train_sentencepiece`, with the same ids."""
    proto = _parsed(model)
    is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    special_tokens = [piece.piece for piece in proto.pieces if piece.type in (piece.UNKNOWN, piece.CONTROL)]
    if is_bpe:
        vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        tokenizer = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=_merges(normal),
                unk_token=SPECIAL_TOKENS["unk_token"],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        # No piece but a run of spaces has a space behind another character, so no merge crosses this cut. It makes
        # words short enough for the cache of `tokenizers`: 6.6 MB/s on source files against 5.8 uncut.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{_SPACE}+"), behavior="merged_with_next")
    else:
        # `tokenizers` matches special tokens and "<0x41>" in the text like any piece. At this score their single
        # characters, which are all pieces, always win; a character without a piece has no
        # alternative, so what it costs does not matter.
        if missing := set(_PRINTABLE_ASCII) - normal.keys():
            raise ValueError(f"the unigram has no piece for {' '.join(sorted(missing))}")
        longest = max(map(len, special_tokens))
        never = (longest + 1) * min(normal.values()) - 1.0
        pieces = [(piece.piece, normal.get(piece.piece, never)) for piece in proto.pieces]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_special_tokens(tokenizer, special_tokens)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a BPE, best first: every split of a piece into two pieces.

    sentencepiece merges any two neighbours that make up a piece, the best piece first, the leftmost of equals.
    `tokenizers` ranks the splits of one piece, so where two can overlap (X Y Z with XY == YZ) the rank has to prefer
    the left one: the split where the piece, moved by X, meets itself.
    """
    ranked = [
        (-score, not piece.startswith(piece[i:]), i, piece[:i], piece[i:])
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(ranked)]


def check_conversion(model: bytes, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Raises RuntimeError when `tokenizer` and sentencepiece differ in any chunk of `texts`."""
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in texts:
        for chunk in _chunks(text):
            if tokenizer.encode(chunk, add_special_tokens=False).ids != reference.encode(chunk):
                raise RuntimeError(
                    f"the converted tokenizer differs from sentencepiece on {chunk[:200]!r}...: please report this"
                )


def train_wordpiece(texts: list[str], vocab_size: int, lowercase: bool, further: Sequence[str] = ()) -> Tokenizer:
    """Trains a WordPiece with BERT's normalizer and pre-tokenizer.

    further: special tokens behind those of `SPECIAL_TOKENS`.
    Raises UserError when the texts do not support exactly `vocab_size` pieces, naming the bound.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    normalized = normalizer.normalize_str(" ".join(sorted(alphabet_of(texts))))
    alphabet = sorted(character for character in set(normalized) if not character.isspace())
    # The trainer numbers what it meets in the order of a hash map, which changes from run to run and decides
    # between equal pairs. Told beforehand, in order, every single character has its number.
    special_tokens = [*SPECIAL_TOKENS.values(), *further]
    known = [*special_tokens, *alphabet, *(f"##{character}" for character in alphabet)]
    if vocab_size < len(known):
        raise _unsupported("wordpiece", vocab_size, f"at least {len(known)}")
    trained = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=known,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator((chunk for text in texts for chunk in _chunks(text)), trainer)
    vocabulary = trained.get_vocab()
    if len(vocabulary) != vocab_size:
        raise _unsupported("wordpiece", vocab_size, f"at most {len(vocabulary)}")
    # Built anew, for `trained` holds the alphabet as special tokens.
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _with_special_tokens(tokenizer, special_tokens)


def _with_special_tokens(tokenizer: Tokenizer, special_tokens: Sequence[str]) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_config(further: Sequence[str] = ()) -> dict[str, Any]:
    """The content of tokenizer_config.json: with it, transformers gives the ids of `encoding.Encoder`.

    further: special tokens behind those of `SPECIAL_TOKENS`.
    """
    return {
        **SPECIAL_TOKENS,
        "bos_token": SPECIAL_TOKENS["eos_token"],
        **({"extra_special_tokens": list(further)} if further else {}),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _described(trained_on: dict[str, int]) -> str:
    return f"{trained_on['bytes'] / 1e6:.2f} MB of {trained_on['documents']} documents"


def _check_output(folder: Path, overwrite: bool) -> None:
    """Raises UserError unless `folder` is absent or empty, or is a tokenizer that --overwrite gives up."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file, expected a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"--output_dir {folder} holds something else (another job, or files of another origin):"
            " give another folder, or --overwrite to replace a tokenizer"
        )
    try:
        read_manifest(folder, "tokenizer")
    except UserError as error:
        raise UserError(f"--overwrite replaces finished tokenizers only: {error}") from None


def _write(
    folder: Path, tokenizer: Tokenizer, model: bytes | None, job: dict[str, Any], trained_on: dict[str, int]
) -> None:
    """Writes the folder; one that is replaced gives up its place only when the new one is whole."""
    further = job.get("special_tokens", [])
    with durable.replacing_folder(folder, overwrite=True) as temporary:
        (temporary / encoding.TOKENIZER_FILE).write_text(tokenizer.to_str(), encoding="utf-8")
        config = json.dumps(tokenizer_config(further), indent=2) + "\n"
        (temporary / encoding.CONFIG_FILE).write_text(config, encoding="utf-8")
        if model is not None:
            (temporary / MODEL_FILE).write_bytes(model)
        info = encoding.load_tokenizer_info(temporary)
        Manifest(
            kind="tokenizer",
            job=job,
            files={path.name: FileRecord.of(path) for path in sorted(temporary.iterdir())},
            content={
                "fingerprint": info.fingerprint,
                "vocab_size": info.vocab_size,
                "type": job["type"],
                "special_tokens": {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), *further])},
                "trained_on": trained_on,
            },
        ).write(temporary)
