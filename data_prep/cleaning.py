"""Cleaning as a step of a document stream: the text made regular, then the rules that drop documents or lines.

docs/cleaning.md says what is done, in words and formulas, and where the thresholds come from.
"""

import functools
import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, groupby
from typing import Any, ClassVar

from data_prep import rules as kernel
from data_prep.documents import Batch
from data_prep.errors import UserError, nearest
from data_prep.language import DEFAULT_MIN_SCORE, Identifier, check_languages
from data_prep.stream import Samples

LANGUAGE = "language"
EMPTY = "empty"
KEPT = "kept"
RULES = (*kernel.DEFAULTS, LANGUAGE)
# FineWeb's published rules in their order (Penedo et al. 2024; datatrove's examples/fineweb.py). Its C4 keeps lines
# without terminal punctuation.
DEFAULT_RULES = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
DEFAULT_SETTINGS = ("c4.terminal_punctuation=0",)
_SHOWN_CHARACTERS = 1000
# What str.splitlines ends a line at beside \n; the other control characters are removed.
_LINE_ENDS = re.compile("\r\n?|[\v\f\x1c-\x1e\x85]")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Patterns and replacements of datatrove's PIIFormatter (Apache-2.0).
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
_EMAIL = re.compile(
    rf"\b{_ATOM}(?:\.{_ATOM})*@(?:(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z0-9]"
    rf"(?:[A-Za-z0-9-]*[A-Za-z0-9])?|\[(?:{_OCTET}\.){{3}}(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?|"
    r"[A-Za-z0-9-]*[A-Za-z0-9]:)])"
)
_MAIL_REACH = 320  # an address is at most 254 characters long (RFC 5321)
_IP = re.compile(rf"(?:{_OCTET}\.){{3}}{_OCTET}")
_NUMBERS = re.compile(r"[0-9][0-9.]{5,}[0-9]")
_EMAILS = ("email@example.com", "firstname.lastname@example.org")
_IPS = ("22.214.171.124", "126.96.36.199", "188.8.131.52", "184.108.40.206", "220.127.116.11", "18.104.22.168")


def regular_text(text: str) -> str:
    """NFC, lines that end in \\n, no other control characters than tabs."""
    if _CONTROLS.search(text):
        text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return text


def mask_pii(text: str) -> str:
    """E-mail addresses and public IPv4 addresses replaced; the replacements take turns within a document."""
    if "@" in text:
        text = _mask_mail(text)
    addresses = cycle(_IPS)

    def masked(match: re.Match[str]) -> str:
        return next(addresses) if _is_public(match[0]) else match[0]

    # The pattern is slow, so it sees runs of digits and dots only; no match is longer than its run.
    return _NUMBERS.sub(lambda run: _IP.sub(masked, run[0]) if run[0].count(".") > 2 else run[0], text)


def _mask_mail(text: str) -> str:
    """The pattern, which is slow, sees the surroundings of each "@" up to white space only."""
    emails = cycle(_EMAILS)
    pieces = []
    done = 0
    while (at := text.find("@", done)) >= 0:
        before, after = text[max(done, at - _MAIL_REACH) : at], text[at : at + _MAIL_REACH]
        start = at - len(before.split()[-1]) if before and not before[-1].isspace() else at
        end = at + len(after.split(None, 1)[0])
        pieces += [text[done:start], _EMAIL.sub(lambda _: next(emails), text[start:end])]
        done = end
    return "".join((*pieces, text[done:]))


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _mojibake_fixer() -> Callable[[str], str]:
    try:
        import ftfy
        from ftfy.badness import is_bad
    except ImportError:
        raise UserError("--fix_mojibake needs the ftfy package: pip install 'bert-gpt-pretraining[mojibake]'") from None

    # Encoding errors alone: ftfy's other repairs (quotes, entities, widths) change text that is not broken.
    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    return lambda text: ftfy.fix_text(text, config) if not text.isascii() and is_bad(text) else text


@dataclass(frozen=True)
class CleanOptions:
    """What cleaning does; its fields identify the result.

    rules: in the order in which they are applied, of RULES.
    parameters: (rule.parameter, threshold or None for off) of every rule but the language.
    languages: documents in others are dropped by the language rule; none given: any language will do.
    min_language_score: the probability of its language that a document must exceed.
    id_field: which of the documents' fields samples show as their id.
    """

    name: ClassVar[str] = "clean"

    rules: tuple[str, ...]
    parameters: tuple[tuple[str, float | None], ...]
    languages: tuple[str, ...] = ()
    min_language_score: float = DEFAULT_MIN_SCORE
    fix_mojibake: bool = False
    mask_pii: bool = False
    id_field: str = "id"

    @staticmethod
    def of(
        rules: Sequence[str] | None = None,
        settings: Iterable[str] = (),
        *,
        languages: Sequence[str] = (),
        **options: Any,
    ) -> "CleanOptions":
        """rules: names, or None for FineWeb's. settings: "rule.parameter=value". `languages` adds the language rule.

        Raises UserError for unknown names and impossible values.
        """
        if rules is None:
            rules, settings = DEFAULT_RULES, (*DEFAULT_SETTINGS, *settings)
        for rule in rules:
            if rule not in RULES:
                raise UserError(f"--rules {rule}: unknown rule; {nearest(rule, RULES)}")
        if len(set(rules)) < len(rules):
            raise UserError(f"--rules {' '.join(rules)}: a rule stands twice, expected each once")
        if languages and LANGUAGE not in rules:
            rules = (LANGUAGE, *rules)
        score = options.get("min_language_score", DEFAULT_MIN_SCORE)
        if not 0 <= score < 1:
            raise UserError(f"--min_language_score {score}: expected 0 <= score < 1")
        parameters = tuple(kernel.parameters_of(settings).items())
        return CleanOptions(tuple(rules), parameters, check_languages(languages), **options)

    def make(self, part_number: int) -> "Cleaner":
        return Cleaner(self)

    def job(self) -> dict[str, Any]:
        """Every field, JSON-able."""
        return asdict(self)


class Cleaner:
    """The cleaning of one part."""

    def __init__(self, options: CleanOptions) -> None:
        self._options = options
        self._parameters = dict(options.parameters)
        self._thresholds = list(self._parameters.values())
        self._fix_mojibake = _mojibake_fixer() if options.fix_mojibake else None
        self._identifier = Identifier() if LANGUAGE in options.rules else None
        self._stages: list[kernel.Rules | None] = []  # None stands for the language rule
        for is_language, names in groupby(options.rules, lambda rule: rule == LANGUAGE):
            self._stages.append(None if is_language else kernel.Rules(tuple(names), self._thresholds))
        self._documents = Counter({"in": 0, "out": 0})
        self._bytes = Counter({"in": 0, "out": 0})
        self._removed: Counter[str] = Counter()
        self._changed: Counter[str] = Counter()
        self._languages: Counter[str] = Counter()
        self._samples = Samples()

    def __call__(self, batch: Batch) -> Batch:
        self._documents["in"] += len(batch.texts)
        self._bytes["in"] += sum(batch.sizes())
        texts = [self._regular(text) for text in batch.texts]
        batch = Batch(batch.part, texts, batch.fields, batch.lines, batch.consumed)
        blank = [index for index, text in enumerate(texts) if not text or text.isspace()]
        if blank:
            for index in blank:
                self._remove(batch, index, EMPTY, 0, None)
            batch = batch.select(sorted(set(range(len(texts))) - set(blank)))
        for rules in self._stages:
            if batch.texts:
                batch = self._identified(batch) if rules is None else self._ruled(batch, rules)
        for index in range(len(batch.texts)):
            self._samples.offer(KEPT, batch.place(index), functools.partial(self._shown, batch, index))
        self._documents["out"] += len(batch.texts)
        self._bytes["out"] += sum(batch.sizes())
        return batch

    def summary(self) -> dict[str, Any]:
        """Documents and bytes in and out, documents removed by reason, changed by what changed them, C4's lines."""
        lines: Counter[str] = Counter()
        for rules in self._stages:
            if rules is not None:
                lines.update(rules.lines)
        return {
            "documents": dict(self._documents),
            "bytes": dict(self._bytes),
            "removed": dict(sorted(self._removed.items())),
            "changed": dict(sorted(self._changed.items())),
            "lines": dict(lines) if "c4" in self._options.rules else {},
            "languages": dict(sorted(self._languages.items())),
            "samples": self._samples.summary(),
        }

    def _regular(self, text: str) -> str:
        if self._fix_mojibake:
            text = self._counted("mojibake", text, self._fix_mojibake(text))
        text = self._counted("regular_text", text, regular_text(text))
        if self._options.mask_pii:
            text = self._counted("pii", text, mask_pii(text))
        return text

    def _counted(self, change: str, before: str, after: str) -> str:
        if after is not before and after != before:
            self._changed[change] += 1
        return after

    def _ruled(self, batch: Batch, rules: kernel.Rules) -> Batch:
        verdicts = rules(batch.texts)
        for index, parameter in enumerate(verdicts.parameters):
            if parameter >= 0:
                self._remove(
                    batch, index, kernel.REASONS[parameter], verdicts.values[index], self._thresholds[parameter]
                )
        kept = []
        for index, parameter in enumerate(verdicts.parameters):
            if parameter < 0 and not verdicts.texts[index]:
                self._remove(batch, index, EMPTY, 0, None)
            elif parameter < 0:
                kept.append(index)
        self._changed["c4_lines"] += verdicts.edited
        left = Batch(batch.part, verdicts.texts, batch.fields, batch.lines, batch.consumed)
        return left if len(kept) == len(batch.texts) else left.select(kept)

    def _identified(self, batch: Batch) -> Batch:
        assert self._identifier is not None
        wanted, least = self._options.languages, self._options.min_language_score
        kept = []
        for index, language in enumerate(self._identifier(batch.texts)):
            self._languages[language.code] += 1
            if wanted and language.code not in wanted:
                found = f"{language.code} {language.score:.2f}"
                self._remove(batch, index, f"{LANGUAGE}.other", found, " ".join(wanted))
            elif language.score <= least:
                self._remove(batch, index, f"{LANGUAGE}.below_min_score", language.score, least)
            else:
                kept.append(index)
        return batch.select(kept)

    def _remove(self, batch: Batch, index: int, reason: str, value: float | str, threshold: float | str | None) -> None:
        self._removed[reason] += 1
        self._samples.offer(
            reason,
            batch.place(index),
            lambda: self._shown(batch, index) | {"value": value, "threshold": threshold},
        )

    def _shown(self, batch: Batch, index: int) -> dict[str, Any]:
        return {
            "id": batch.fields[index].get(self._options.id_field),
            "text": batch.texts[index][:_SHOWN_CHARACTERS],
        }
