"""A mixture is a manifest: shares of the samples, checked against the shards that it names."""

import json
import shutil
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.manifest import Manifest, read_manifest
from data_prep.mix import Component, Mixture, is_mixture, read_mixture
from data_prep.shards import ShardSet
from data_prep.verify import verify
from tests.data_prep.made_folders import make_shards, make_tokenizer
from tests.data_prep.test_shards import write_shard_set

WIKI = [f"an article, number {number}, on something" for number in range(30)]
CODE = [f"def f{number}(): return {number}" for number in range(12)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """wiki/shards and code/shards of one tokenizer."""
    root = tmp_path_factory.mktemp("mix")
    tokenizer = make_tokenizer(root / "tokenizer", WIKI + CODE)
    make_shards(root / "wiki/shards", WIKI, tokenizer)
    make_shards(root / "code/shards", CODE, tokenizer, shards=1)
    return root


def test_a_mixture_names_its_shards_and_copies_nothing(made, tmp_path, data_prep):
    shutil.copytree(made, tmp_path / "data")
    folders = [tmp_path / "data/wiki/shards", tmp_path / "data/code/shards"]
    command = ("mix", "--shards", *folders, "--weights", 7, 3, "--output_dir", tmp_path / "data/mixture")
    first = data_prep(*command)
    assert first.status == 0, first.stderr
    assert [path.name for path in (tmp_path / "data/mixture").iterdir()] == ["manifest.json"]
    mixture = read_mixture(tmp_path / "data/mixture")
    sets = [ShardSet.open(folder) for folder in folders]
    assert [component.name for component in mixture.components] == ["wiki/shards", "code/shards"]
    assert [component.folder for component in mixture.components] == ["../wiki/shards", "../code/shards"]
    assert [component.weight for component in mixture.components] == [0.7, 0.3]
    assert [component.tokens for component in mixture.components] == [sum(one.tokens) for one in sets]
    assert [component.documents for component in mixture.components] == [30, 12]
    assert [mixture.open(component).fingerprint for component in mixture.components] == [
        one.fingerprint for one in sets
    ]
    assert "up to date" in data_prep(*command).stdout
    # Everything moved together is still whole: the names are relative.
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert data_prep("verify", tmp_path / "moved/mixture").status == 0
    assert is_mixture(tmp_path / "moved/mixture") and not is_mixture(tmp_path / "moved/wiki/shards")


def test_without_weights_every_document_is_seen_equally_often(made, tmp_path, data_prep):
    assert (
        data_prep("mix", "--shards", made / "wiki/shards", made / "code/shards", "--output_dir", tmp_path).status == 0
    )
    mixture = read_mixture(tmp_path)
    epochs = mixture.epochs(5 * sum(component.tokens for component in mixture.components))
    assert epochs == pytest.approx([5, 5])


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 10**12)), min_size=1, max_size=6), st.integers(1, 10**13)
)
def test_epochs_are_the_share_of_the_tokens_over_those_there_are(parts, trained):
    total = sum(weight for weight, _ in parts)
    components = tuple(Component("x", "x", weight / total, 1, tokens, "f", None) for weight, tokens in parts)
    expected = [Fraction(weight, total) * trained / tokens for weight, tokens in parts]
    mixture = Mixture(None, components, "uint16")
    assert mixture.epochs(trained) == pytest.approx([float(value) for value in expected])
    assert max(mixture.epochs(mixture.tokens_once())) == pytest.approx(1)


def test_sets_of_different_tokenizers_or_dtypes_are_refused_naming_both(made, tmp_path, data_prep):
    other = make_tokenizer(tmp_path / "tokenizer", CODE, vocab_size=300)
    make_shards(tmp_path / "other", CODE, other)
    outcome = data_prep("mix", "--shards", made / "wiki/shards", tmp_path / "other", "--output_dir", tmp_path / "m")
    for folder in (made / "wiki/shards", tmp_path / "other"):
        assert str(folder) in outcome.error
        assert read_manifest(folder).content["tokenizer"]["fingerprint"][:12] in outcome.error
    for name, size in (("small", 1000), ("large", 70_000)):
        (tmp_path / name).mkdir()
        write_shard_set(tmp_path / name, [[[1, 2, 0]]], size)
    outcome = data_prep("mix", "--shards", tmp_path / "small", tmp_path / "large", "--output_dir", tmp_path / "m")
    assert f"{tmp_path}/small holds uint16, {tmp_path}/large int32" in outcome.error
    assert not (tmp_path / "m").exists()


def test_shards_without_a_manifest_do_not_mix_with_those_of_a_known_tokenizer(made, tmp_path, data_prep):
    (tmp_path / "foreign").mkdir()
    for path in (made / "code/shards").glob("*.[bi][id][nx]"):
        shutil.copy(path, tmp_path / "foreign")
    outcome = data_prep("mix", "--shards", made / "wiki/shards", tmp_path / "foreign", "--output_dir", tmp_path / "m")
    assert "with unknown (of another program)" in outcome.error
    assert data_prep("mix", "--shards", tmp_path / "foreign", "--output_dir", tmp_path / "m").status == 0
    [component] = read_mixture(tmp_path / "m").components
    assert component.tokenizer_fingerprint is None and component.documents == 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["wiki/shards", "code/shards", "--weights", "1"], "--weights has 1 numbers, expected 2"),
        (["wiki/shards", "wiki/../wiki/shards"], "twice; name it once"),
        (["wiki/shards", "tokenizer"], "holds tokenizer, expected shards"),
        (["wiki/absent"], "manifest.json is missing"),
    ],
)
def test_a_wrong_mixture_is_one_error(made, tmp_path, data_prep, monkeypatch, flags, message):
    monkeypatch.chdir(made)
    assert message in data_prep("mix", "--shards", *flags, "--output_dir", tmp_path / "m").error
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "x"])
def test_a_weight_is_a_finite_number_above_zero(made, tmp_path, data_prep, weight):
    outcome = data_prep("mix", "--shards", made / "wiki/shards", f"--weights={weight}", "--output_dir", tmp_path / "m")
    assert outcome.status == 2 and "expected a number above 0" in outcome.stderr


def test_the_output_folder_is_never_one_of_the_components(made, tmp_path, data_prep):
    shutil.copytree(made / "wiki/shards", tmp_path / "shards")
    command = ("mix", "--shards", tmp_path / "shards", "--output_dir", tmp_path / "shards", "--overwrite")
    assert "holds the input" in data_prep(*command).error
    verify(tmp_path / "shards")


def test_changed_and_missing_components_are_found(made, tmp_path, data_prep):
    shutil.copytree(made, tmp_path / "data")
    folders = [tmp_path / "data/wiki/shards", tmp_path / "data/code/shards"]
    mixture = tmp_path / "mixture"
    assert data_prep("mix", "--shards", *folders, "--output_dir", mixture).status == 0
    verify(mixture)
    tokenizer = tmp_path / "data/tokenizer"
    shutil.rmtree(folders[0])
    make_shards(folders[0], WIKI[:-1], tokenizer)
    shutil.rmtree(folders[1])
    outcome = data_prep("verify", mixture)
    assert outcome.status == 1 and "2 faults" in outcome.stderr
    assert f"{folders[0]} has fingerprint" in outcome.stderr and f"{folders[1]}, which is missing" in outcome.stderr
    with pytest.raises(UserError, match="the shards have changed; mix again"):
        read_mixture(mixture).open(read_mixture(mixture).components[0])


def test_counts_and_weights_that_do_not_fit_are_found(made, tmp_path, data_prep):
    folders = [made / "wiki/shards", made / "code/shards"]
    assert data_prep("mix", "--shards", *folders, "--output_dir", tmp_path / "m").status == 0
    manifest = read_manifest(tmp_path / "m")
    content = json.loads(json.dumps(manifest.content))
    content["components"][0]["tokens"] += 1
    content["components"][1]["weight"] *= 2
    Manifest("mixture", manifest.job, {}, content).write(tmp_path / "m")
    with pytest.raises(UserError, match=r"counts of wiki/shards are not those of its shards\n.*weights add up to"):
        verify(tmp_path / "m")
    del content["components"][0]["weight"]
    Manifest("mixture", manifest.job, {}, content).write(tmp_path / "m")
    with pytest.raises(UserError, match=r"is damaged .* mix again"):
        read_mixture(tmp_path / "m")


def test_inspect_shows_weights_tokens_and_epochs(made, tmp_path, data_prep):
    folders = [made / "wiki/shards", made / "code/shards"]
    assert data_prep("mix", "--shards", *folders, "--weights", 1, 3, "--output_dir", tmp_path / "m").status == 0
    tokens = [sum(ShardSet.open(folder).tokens) for folder in folders]
    shown = data_prep("inspect", tmp_path / "m", "--tokens", "1e6").stdout
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if "/shards" in line and "%" in line}
    assert rows == {
        "wiki/shards": ["25.00%", "30", f"{tokens[0]:,}", f"{0.25e6 / tokens[0]:,.3f}"],
        "code/shards": ["75.00%", "12", f"{tokens[1]:,}", f"{0.75e6 / tokens[1]:,.3f}"],
    }
    assert "the longest that reads nothing twice" in data_prep("inspect", tmp_path / "m").stdout
