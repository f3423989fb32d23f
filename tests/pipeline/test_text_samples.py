"""Text samples say what the model would: greedy continuations, and fills where tokens were masked."""

import itertools

import pytest
import torch

from data_prep.encoding import Encoder, load_tokenizer_info
from data_prep.plan import PackSettings
from data_prep.shards import ShardSet
from pipeline.heads import LossHead
from pipeline.text_samples import NEW_TOKENS, PROMPT_TOKENS, text_samples
from pipeline.vocabulary import pad_vocabulary
from tests.made_samples import made_samples
from tests.pipeline.test_objective import CPU, small_model


@pytest.fixture(scope="module")
def held_out(tiny_shards, tiny_tokenizer):
    def make(objective):
        shards = ShardSet.open(tiny_shards)
        settings = PackSettings(objective, 64, "concatenate" if objective == "causal" else "full_sentences", 0.2)
        return made_samples({"corpus": shards}, tiny_tokenizer, settings, "validation")

    return make


def section(text, title):
    """The words under a title; lines that go on are indented."""
    lines, found = text.splitlines(), []
    for line in lines:
        if line[:11].strip():
            taken = line.startswith(title)
        if taken:
            found.append(line[11:])
    return " ".join(found)


def test_prompts_are_continued_as_plain_greedy_decoding_would(held_out, tiny_tokenizer):
    samples, encoder = held_out("causal"), Encoder(tiny_tokenizer)
    vocabulary = load_tokenizer_info(tiny_tokenizer).vocab_size
    model = small_model("gpt2", "causal", vocab_size=vocabulary, max_position_embeddings=64)
    plain = small_model("gpt2", "causal", vocab_size=vocabulary, max_position_embeddings=64).eval()
    pad_vocabulary(model, 100)
    head = LossHead(model, CPU, vocabulary=vocabulary)
    texts = text_samples(head, samples, encoder, 2, CPU, torch.float32)
    assert len(texts) == 2 and model.training
    assert texts == text_samples(head, samples, encoder, 2, CPU, torch.float32)
    batch = samples.batch_at(samples.held_out(2))
    for row, text in enumerate(texts):
        edges = [edge - row * 64 for edge in batch.boundaries.tolist() if row * 64 <= edge <= row * 64 + 64]
        begin, end = max(itertools.pairwise(edges), key=lambda pair: pair[1] - pair[0])
        length = min(PROMPT_TOKENS, (end - begin) // 2)
        ids = torch.from_numpy(batch.input_ids[row, begin : begin + length].astype("int64"))[None]
        assert section(text, "prompt") == " ".join(encoder.decode(ids[0].numpy()).split())
        rest = batch.input_ids[row, begin + length : min(end, begin + length + NEW_TOKENS)]
        assert section(text, "held-out") == " ".join(encoder.decode(rest).split())
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, plain(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        continued = " ".join(encoder.decode(ids[0, length:].numpy()).split())
        assert continued.startswith(section(text, "continued")) and len(section(text, "continued")) > 10


def test_masked_tokens_are_filled_in_beside_what_they_were(held_out, tiny_tokenizer):
    samples, encoder = held_out("mlm"), Encoder(tiny_tokenizer)
    vocabulary = load_tokenizer_info(tiny_tokenizer).vocab_size
    model = small_model("bert", "mlm", vocab_size=vocabulary, max_position_embeddings=64)
    head = LossHead(model, CPU)
    batch = samples.batch_at(samples.held_out(1))
    assert batch.target_ids[0] != batch.target_ids[1] and batch.targets[1] < 64
    with torch.no_grad():
        # A bias that makes the model say the first masked token everywhere.
        model.cls.predictions.bias[int(batch.target_ids[0])] = 1e4
    (text,) = text_samples(head, samples, encoder, 1, CPU, torch.float32)
    right, other = (encoder.decode([token]).strip() for token in batch.target_ids[:2])
    shown = "".join(text.split())
    assert f"{{{right}}}" in shown and f"{{{right}>{other}}}" in shown
