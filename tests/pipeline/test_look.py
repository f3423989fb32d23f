"""`pipeline.look`: losses and attention are the model's own, and the page needs nothing from elsewhere."""

import html
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import look
from pipeline.exported import load_exported
from pipeline.look import as_png, attention_of, look_at, texts_of_tokens
from tests.made_models import made_model

TEXT = "The teacher counts\n\n  <b>every</b> & 日本 👍🏽 worker"


@pytest.fixture(scope="module", params=["causal", "mlm"])
def exported(request, tmp_path_factory, tiny_tokenizer):
    return load_exported(made_model(tmp_path_factory.mktemp(request.param), request.param, tiny_tokenizer))


@pytest.fixture
def run(exported, capsys):
    def run(*arguments):
        status = look.main(["--model", str(exported.folder), *map(str, arguments)])
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return run


def test_losses_and_attention_are_the_models(exported):
    found = look_at(exported, TEXT, 20)
    ids = exported.encoder.encode_batch([TEXT])[0].tolist()
    special = exported.tokenizer.special
    assert len(found.tokens) == len(ids) and "".join(token.text for token in found.tokens) == TEXT
    if exported.objective == "causal":
        row = torch.tensor([[special.end_of_document, *ids]])
        with torch.no_grad():
            loss = exported.model(input_ids=row, labels=row).loss.item()
        assert found.mean_loss == pytest.approx(loss, rel=1e-5)
        assert all(token.rank is not None for token in found.tokens)
        assert found.frame == ("<|endoftext|>",) and found.attended == 20
    else:
        assert found.frame == ("[CLS]", "[SEP]") and found.attended == 20
        assert found.tokens[0].rank is None
    assert len(found.maps) == 2
    heads = attention_of(exported.model, ids[:9])
    assert [layer.shape for layer in heads] == [(2, 9, 9)] * 2
    for layer in heads:
        assert np.allclose(layer.sum(-1), 1, atol=1e-5)
        if exported.objective == "causal":
            assert np.all(np.triu(layer, 1) == 0)


def test_the_page_shows_every_token_by_its_loss_and_needs_nothing_else(exported, run, tmp_path):
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = run("--input", tmp_path / "text.txt", "--output_dir", tmp_path / "look", "--tensorboard", tmp_path / "run")
    assert done.status == 0, done.err
    page = (tmp_path / "look" / "index.html").read_text()
    spans = re.findall(r'<span style="--share:([\d.]+)" title="([^"]*)">(.*?)</span>', page, re.DOTALL)
    found = look_at(exported, TEXT, 0)
    for (share, about, shown), token in zip(spans, found.tokens, strict=True):
        assert float(share) == pytest.approx(min(1, token.loss / 10), abs=2e-3)
        assert float(about.split(" nats")[0]) == pytest.approx(token.loss, abs=2e-3)
        assert html.unescape(shown).replace("↵", "") == (token.text or "·")
    assert "<b>" not in page and "default-src 'none'" in page and "<script" not in page
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', page) and "url(" not in page
    assert page.count("data:image/png") == 2
    names = sorted(path.name for path in (tmp_path / "look" / "attention").iterdir())
    assert names == ["text1_layer01.png", "text1_layer02.png"]
    board = read_events(tmp_path / "run" / "tensorboard" / "look")
    assert board.Tags()["images"] == [f"look/text_1/attention_layer_0{layer}" for layer in (1, 2)]
    (text,) = board.Tensors("look/text_1/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert table.count("\n") == len(found.tokens) + 1 and f"| {found.tokens[0].loss:.3f} |" in table
    image = board.Images("look/text_1/attention_layer_01")[0].encoded_image_string
    first = (tmp_path / "look" / "attention" / "text1_layer01.png").read_bytes()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image))), np.asarray(Image.open(io.BytesIO(first))))


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    return board


def test_an_image_is_darker_where_a_head_looks():
    heads = np.zeros((3, 4, 4), dtype=np.float32)
    heads[0], heads[1, 2, 1], heads[2, 0, 3] = np.eye(4), 1.0, 0.25
    image = np.asarray(Image.open(io.BytesIO(as_png(heads)))).astype(int)
    scale, gap = 160 // 4, 4
    size = 4 * scale + gap

    def colour(head, row, column):
        top, left = head // 2 * size + gap, head % 2 * size + gap
        return image[top + row * scale + 1, left + column * scale + 1].tolist()

    assert image.shape == (2 * size + gap, 2 * size + gap, 3)
    assert colour(0, 3, 3) == colour(1, 2, 1) == [44, 106, 138] and colour(0, 0, 1) == [255, 255, 255]
    assert colour(2, 0, 3) == [150, 180, 196], "a quarter is half of the way, by the square root"


@given(st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_the_pieces_of_a_text_are_the_text(tiny_tokenizer, text):
    from data_prep.encoding import Encoder

    encoder = Encoder(tiny_tokenizer)
    starts = encoder.token_starts(text)
    pieces = texts_of_tokens(text, starts)
    assert len(pieces) == len(starts)
    assert "".join(pieces) == (text if len(starts) else "")


def test_what_stands_there_is_not_lost_and_mistakes_are_one_line(run, tmp_path):
    folder = tmp_path / "look"
    flags = ("--output_dir", folder, "--text", "x")
    assert "tensorboard/" in run(*flags, "--tensorboard", tmp_path).err and not folder.exists()
    assert "--attention_tokens is -1" in run(*flags, "--attention_tokens", -1).err
    assert (
        run(*flags, "--attention_tokens", 0).out.splitlines()[-1]
        == f"{folder}/index.html: the texts by loss, and 0 maps"
    )
    assert run(*flags).err == f"error: --output_dir {folder} is not empty; give another folder or --overwrite\n"
    assert run(*flags, "--overwrite").status == 0 and (folder / "attention").exists()
    (folder / "index.html").rename(folder / "other.html")
    assert "holds something else" in run(*flags, "--overwrite").err
