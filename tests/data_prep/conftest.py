"""`python -m data_prep` as a user runs it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep import __main__ as data_prep_main

REPOSITORY = Path(data_prep_main.__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """Exit status and output of one command."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one `error: ...` line; asserts that there is exactly one, no traceback and a failing status."""
        assert self.status == 1, self
        assert "Traceback" not in self.stderr, self.stderr
        # Whatever is not the progress bar (it redraws itself with \r).
        lines = [line for line in self.stderr.replace("\r", "\n").splitlines() if line and "B/s" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.stderr
        return lines[0]


@pytest.fixture
def data_prep(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Runs `python -m data_prep ARGUMENTS` in this process (its workers are processes of their own)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["data_prep", *map(str, arguments)])
        capfd.readouterr()
        try:
            status = data_prep_main.main()
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        output = capfd.readouterr()
        return Outcome(status, output.out, output.err)

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def start_program() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts Python with ARGUMENTS as a process group of its own, which ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **options: object) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def start_data_prep(start_program) -> Callable[..., "subprocess.Popen[str]"]:
    """Starts `python -m data_prep ARGUMENTS` as `start_program` does."""
    return lambda *arguments: start_program("-m", "data_prep", *arguments, cwd=REPOSITORY)


def _train_byte_level(folder: Path, texts: list[str], *, add_prefix_space: bool = False) -> Path:
    """GPT-2's kind of tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="session")
def train_byte_level() -> Callable[..., Path]:
    return _train_byte_level


@pytest.fixture(scope="session")
def tokenizer_folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path, tiny_texts: list[str]
) -> dict[str, Path]:
    """One tokenizer of each kind, trained on `tiny_corpus`."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind, size in (("unigram", 420), ("wordpiece", 400)):
        flags = f"--input {tiny_corpus}/*.jsonl --output_dir {root / kind} --type {kind} --vocab_size {size}"
        data_prep_main.run_stage("train_tokenizer", flags.split())
    return {
        "byte_level": _train_byte_level(root / "byte_level", tiny_texts),
        "bpe": tiny_tokenizer,
        "unigram": root / "unigram",
        "wordpiece": root / "wordpiece",
    }
