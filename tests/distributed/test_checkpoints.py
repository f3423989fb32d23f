"""Real engines save, go back, and take on the checkpoints of other world sizes, ZeRO stages and precisions."""

import json

import pytest

from tests.distributed.ranks import launch

pytestmark = pytest.mark.ranks
# ZeRO stage, precision, optimizer.
KINDS = [
    "0-fp32-AdamW", "1-fp32-AdamW", "2-fp32-AdamW", "3-fp32-AdamW", "0-bf16-AdamW", "2-bf16-AdamW", "3-bf16-AdamW",
    "0-fp32-Lion", "2-bf16-Lion", "0-fp32-Muon", "1-bf16-Muon", "3-fp32-Muon", "0-fp32-Lamb", "0-bf16-Lamb",
]  # fmt: skip
STAGES = ["2-fp32-AdamW", "3-fp32-AdamW", "1-fp32-AdamW", "0-fp32-AdamW", "2-fp32-AdamW"]
CARRIED = [
    ("0-bf16-AdamW", "3-bf16-AdamW"), ("3-bf16-AdamW", "2-bf16-AdamW"), ("2-bf16-AdamW", "0-bf16-AdamW"),
    ("0-fp32-AdamW", "3-bf16-AdamW"), ("3-bf16-AdamW", "1-fp32-AdamW"), ("2-bf16-Lion", "0-fp32-Lion"),
    ("0-fp32-Muon", "1-bf16-Muon"), ("1-bf16-Muon", "3-fp32-Muon"), ("3-fp32-Muon", "0-fp32-Muon"),
    ("0-fp32-Lamb", "0-bf16-Lamb"),
]  # fmt: skip
WORLDS = ["2-fp32-AdamW", "3-bf16-AdamW", "3-fp32-Muon"]  # 2 -> 1 -> 2 and 2 -> 4 -> 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def results(folder):
    """What each case found, by its name (checkpoint_states.py); four launches."""

    def found(ranks, name, cases):
        launch(ranks, "tests/distributed/checkpoint_states.py", folder, name, *map(json.dumps, cases))
        return json.loads((folder / name).read_text())

    first = [[kind, kind, None] for kind in KINDS] + [["bare", "2-fp32-AdamW", None]]
    sources = [STAGES[0], *(f"stages {number}" for number in range(len(STAGES)))]
    first += [[f"stages {number}", kind, sources[number]] for number, kind in enumerate(STAGES[1:])]
    first += [[f"{source} to {target}", target, source] for source, target in CARRIED]
    results = found(2, "first.json", first)
    results |= found(1, "one.json", [[f"one {kind}", kind, kind] for kind in WORLDS])
    results |= found(4, "four.json", [[f"four {kind}", kind, f"one {kind}"] for kind in WORLDS])
    back = [[f"two {kind}", kind, f"one {kind}"] for kind in WORLDS]
    return results | found(2, "back.json", back + [[f"again {kind}", kind, f"four {kind}"] for kind in WORLDS])


@pytest.mark.parametrize("kind", KINDS)
def test_going_back_in_the_middle_of_a_run_is_bitwise_exact(kind, results):
    found = results[kind]
    assert found["again"] == found["losses"] and found["same"]
    assert len(set(found["losses"])) == 2 and len(found["digests"]) == 2


def test_a_way_through_all_stages_ends_where_it_began_to_the_bit(results):
    """2 -> 3 -> 1 -> 0 -> 2."""
    straight = results[STAGES[0]]
    assert results["stages 3"]["digests"] == straight["digests"] and results["stages 3"]["losses"] == straight["losses"]
    for number in range(4):
        found = results[f"stages {number}"]
        assert found["losses"] == pytest.approx(straight["losses"], rel=1e-7)
        assert found["same"] and (found["digests"] == straight["digests"]) == (STAGES[number + 1] in STAGES[:3:2])


@pytest.mark.parametrize(("source", "target"), CARRIED)
def test_another_stage_or_precision_goes_on_with_the_same_losses_to_rounding(source, target, results):
    found = results[f"{source} to {target}"]
    # A precision rounds its own way; 2^-8 is bf16's.
    bound = 1e-7 if "bf16" not in source + target else 2e-3
    assert found["losses"] == pytest.approx(results[source]["losses"], rel=bound)
    assert (found["same"] and found["losses"] != results[source]["losses"]) or "AdamW" in source


@pytest.mark.parametrize("kind", WORLDS)
def test_another_world_size_goes_on_with_the_same_losses_and_comes_back_to_the_bit(kind, results):
    """2 -> 1 -> 2 and 2 -> 1 -> 4 -> 2."""
    straight = results[kind]
    for way in ("one", "four"):
        assert results[f"{way} {kind}"]["losses"] == pytest.approx(
            straight["losses"], rel=1e-3 if "bf16" in kind else 1e-6
        )
        assert len(results[f"{way} {kind}"]["digests"]) == {"one": 1, "four": 4}[way]
    for way in ("two", "again"):
        assert results[f"{way} {kind}"]["digests"] == straight["digests"]
        assert results[f"{way} {kind}"]["losses"] == straight["losses"]


def test_the_bare_engine_resumes_a_flipped_bit_and_a_mixed_checkpoint_and_starts_over_without_a_word(results):
    """The controls of tests/pipeline/test_checkpoint.py, where each one is found."""
    assert results["bare"] == {
        "flipped": {"resumed": True, "changed": True},
        "clean": {"resumed": True, "changed": True},  # back to before the flip
        "mixed": {"resumed": True, "changed": True},
        "without latest": {"resumed": False, "changed": False},
    }
