"""The losses without whole logits have the values and gradients of the plain computation."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from pipeline import heads
from pipeline.attention import document_arguments
from pipeline.heads import LossHead, linear_cross_entropy
from pipeline.loader import DeviceBatch
from pipeline.model import build_model
from pipeline.objective import losses
from pipeline.token_drop import install

CPU = torch.device("cpu")
VOCABULARY, BATCH, SEQUENCE = 96, 3, 16
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 1,
    "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.3, "embedding_size": 24,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "classifier_dropout_prob": 0.0,
}  # fmt: skip
CAUSAL, MLM = ["gpt2", "llama", "gpt_neox"], ["bert", "albert", "roberta", "modernbert"]


def small_config(model_type, **changes):
    return AutoConfig.for_model(model_type, **{**SMALL, **changes})


def small_model(model_type, objective, pairs=False, **changes):
    return build_model(small_config(model_type, **changes), objective, 1, pairs=pairs)


def batch_of(objective, seed=0, **further):
    """Rows of two documents; masked LM has a target in five, the causal objective all of them."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(6, VOCABULARY, (2, BATCH, SEQUENCE), generator=generator)
    targets = None
    if objective == "mlm":
        targets = torch.rand(BATCH * SEQUENCE, generator=generator).argsort()[:9].sort().values
    starts = [place for row in range(BATCH) for place in (row * SEQUENCE, row * SEQUENCE + 5 + row)]
    fields = {
        "input_ids": ids,
        "target_ids": labels if targets is None else labels.flatten()[targets],
        "targets": targets,
        "boundaries": torch.tensor([*starts, BATCH * SEQUENCE], dtype=torch.int32),
        "longest": 11,
        "corpus": torch.zeros(BATCH),
        "target_count": 0,
    }
    return DeviceBatch(**fields | further)


def plain(model, batch, z_loss=0.0, label_smoothing=0.0):
    """(sum of what is trained, cross-entropies, cross-entropies of pairs) from the logits of all positions, written
    out as the papers do."""
    shape = tuple(batch.input_ids.shape)
    arguments = document_arguments(batch.boundaries, batch.longest, shape, model.config, torch.float32)
    if getattr(model.config, "use_cache", False):
        arguments["use_cache"] = False
    if batch.kept_positions is not None:
        arguments["kept_positions"] = batch.kept_positions
    output = model(input_ids=batch.input_ids, **arguments)
    logits = (output.logits if "logits" in output else output.prediction_logits).float().flatten(0, 1)
    if batch.targets is not None:
        logits = logits[batch.targets]
    log_z = logits.exp().sum(1).log()
    log_shares = logits - log_z[:, None]
    ids = batch.target_ids.flatten()
    of_tokens = -log_shares[torch.arange(len(ids)), ids]
    trained = (1 - label_smoothing) * of_tokens - label_smoothing * log_shares.mean(1) + z_loss * log_z**2
    of_pairs = None
    if batch.pair_labels is not None:
        pairs = output.sop_logits if "sop_logits" in output else output.seq_relationship_logits
        of_pairs = functional.cross_entropy(pairs, batch.pair_labels, reduction="none")
    return trained.sum(), of_tokens, of_pairs


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(found, expected):
    return float((found - expected).detach().double().norm() / expected.detach().double().norm().clamp(min=1e-30))


def assert_same_as_plain(model, batch, **terms):
    """Values, and the gradients of every parameter, to float32 rounding. Returns the head."""
    reference = copy.deepcopy(model)
    head = LossHead(model, CPU, **terms)
    found = losses(head, batch, torch.float32, scale=0.3)
    trained, of_tokens, of_pairs = plain(reference, batch, **terms)
    torch.testing.assert_close(found.trained, 0.3 * trained, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.of_tokens, of_tokens, rtol=2e-6, atol=1e-6)
    ours, theirs = found.trained, 0.3 * trained
    if of_pairs is not None:
        torch.testing.assert_close(found.of_pairs, of_pairs)
        ours, theirs = ours + found.of_pairs.sum(), theirs + of_pairs.sum()
    expected = gradients(reference, theirs)
    largest = max(float(gradient.norm()) for gradient in expected.values() if gradient is not None)
    for name, gradient in gradients(model, ours).items():
        if expected[name] is None:
            assert gradient is None
            continue
        # Those that are 0 but for rounding (a key's bias) are compared with the largest one's rounding.
        difference = float((gradient - expected[name]).norm())
        assert difference <= 2e-6 * float(expected[name].norm()) + 3e-7 * largest, name
    return head


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setitem(heads._ROWS, "cpu", 7)


@settings(max_examples=60, deadline=None)
@given(
    targets=st.integers(0, 13),
    rows=st.integers(1, 16),
    has_bias=st.booleans(),
    scale=st.sampled_from([1.0, 3.7, 1e-4]),
    z_loss=st.sampled_from([0.0, 0.1]),
    label_smoothing=st.sampled_from([0.0, 0.2]),
)
def test_values_and_gradients_are_those_of_float64(targets, rows, has_bias, scale, z_loss, label_smoothing):
    generator = torch.Generator().manual_seed(targets)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((targets, 8), (40, 8), (40,)))
    ids = torch.randint(40, (targets,), generator=generator)
    inputs = [hidden, weight] + [bias] * has_bias
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    terms = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    bias = ours[2] if has_bias else None
    found, of_tokens, _ = linear_cross_entropy(ours[0], ours[1], bias, ids, scale=scale, rows=rows, **terms)
    logits = functional.linear(*exact)
    expected = functional.cross_entropy(logits, ids, reduction="none")
    trained = functional.cross_entropy(logits, ids, reduction="sum", label_smoothing=label_smoothing)
    trained = scale * (trained + z_loss * logits.logsumexp(1).square().sum())
    torch.testing.assert_close(of_tokens.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.double(), trained.detach(), rtol=1e-6, atol=1e-9)
    (2.5 * found).backward()
    (2.5 * trained).backward()
    for tensor, reference in zip(ours, exact, strict=True):
        assert relative_error(tensor.grad, reference.grad) < 1e-6


@pytest.mark.parametrize("rows", [512, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_gradients_are_no_further_from_the_exact_ones_than_the_plain_ones(dtype, rows):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(400, 64, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(1000, 64, generator=generator)).to(dtype)
    bias = torch.randn(1000, generator=generator).to(dtype)
    ids = torch.randint(1000, (400,), generator=generator)
    scale, loss_scale = 1 / 3000, 1024.0  # as DeepSpeed's of fp16

    def inputs(kind):
        return [tensor.to(kind).requires_grad_() for tensor in (hidden, weight, bias)]

    exact, theirs, ours = inputs(torch.float64), inputs(dtype), inputs(dtype)
    functional.cross_entropy(functional.linear(*exact), ids, reduction="sum").mul(scale * loss_scale).backward()
    logits = functional.linear(*theirs).float()
    functional.cross_entropy(logits, ids, reduction="none").sum().mul(scale).mul(loss_scale).backward()
    linear_cross_entropy(*ours, ids, scale=scale, rows=rows)[0].mul(loss_scale).backward()
    for mine, plains, reference in zip(ours, theirs, exact, strict=True):
        assert mine.grad.dtype == dtype
        assert relative_error(mine.grad, reference.grad) <= 1.02 * relative_error(plains.grad, reference.grad)


@pytest.mark.parametrize("terms", [{}, {"z_loss": 0.01, "label_smoothing": 0.1}], ids=["plain", "terms"])
@pytest.mark.parametrize(
    ("model_type", "objective"), [(name, "causal") for name in [*CAUSAL, "bert"]] + [(name, "mlm") for name in MLM]
)
def test_models_have_the_losses_and_gradients_of_their_logits(model_type, objective, terms, short_chunks):
    changes = {"is_decoder": True} if (model_type, objective) == ("bert", "causal") else {}
    head = assert_same_as_plain(small_model(model_type, objective, **changes), batch_of(objective), **terms)
    assert head.selects and head.fuses


@pytest.mark.parametrize("model_type", ["bert", "albert"])
def test_heads_for_pairs_see_what_they_saw(model_type, short_chunks):
    batch = batch_of("mlm", boundaries=None, pair_labels=torch.tensor([1, -100, 0]))
    head = assert_same_as_plain(small_model(model_type, "mlm", pairs=True), batch)
    assert head.selects and head.fuses


@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_tokens_that_layers_drop_change_nothing_here(objective, short_chunks):
    model = small_model("gpt2" if objective == "causal" else "bert", objective)
    assert install(model) == 1
    kept = torch.rand(1, BATCH, SEQUENCE).argsort(-1)[..., :8].sort(-1).values
    assert_same_as_plain(model.train(), batch_of(objective, kept_positions=kept))


@pytest.mark.parametrize("count", [0, 1, BATCH * SEQUENCE - 1, BATCH * SEQUENCE])
def test_any_number_of_positions_can_be_targets(count, short_chunks):
    for objective, model_type in (("causal", "gpt2"), ("mlm", "bert")):
        targets = torch.arange(count)
        batch = batch_of(objective, targets=targets, target_ids=torch.randint(VOCABULARY, (count,)))
        if count:
            assert_same_as_plain(small_model(model_type, objective), batch)
        else:
            model = small_model(model_type, objective)
            found = losses(LossHead(model, CPU), batch, torch.float32).trained
            assert found == 0
            assert all(gradient is not None and not gradient.any() for gradient in gradients(model, found).values())


@pytest.mark.parametrize(
    ("model_type", "objective", "selects", "changes"),
    [
        ("cohere", "causal", True, {"logit_scale": 0.25}),
        ("granite", "causal", True, {"logits_scaling": 3.0}),
        ("nanochat", "causal", True, {}),  # caps them
        ("esm", "mlm", True, {"vocab_size": VOCABULARY}),  # adds a bias to them
    ],
)  # fmt: skip
def test_models_that_change_their_logits_keep_them(model_type, objective, selects, changes, short_chunks):
    model = small_model(model_type, objective, **changes)
    batch = batch_of(objective, targets=torch.arange(2, 40, 3), target_ids=torch.arange(20, 33), boundaries=None)
    head = assert_same_as_plain(model, batch, z_loss=0.01, label_smoothing=0.1)
    assert (head.selects, head.fuses) == (selects, False)


def test_a_base_model_that_is_not_called_leaves_the_choice_of_targets_to_the_losses(short_chunks):
    """OPT's head calls the decoder inside of it."""
    head = assert_same_as_plain(small_model("opt", "causal", word_embed_proj_dim=32, dropout=0.0), batch_of("causal"))
    assert (head.selects, head.fuses) == (False, True)
    batch = batch_of("causal", targets=torch.arange(2, 40, 3), target_ids=torch.arange(20, 33))
    assert_same_as_plain(small_model("opt", "causal", word_embed_proj_dim=32, dropout=0.0), batch)


class Sizes(TorchDispatchMode):
    """The largest number of elements that an operation returned, weights' gradients aside."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize(("model_type", "objective"), [("gpt2", "causal"), ("bert", "mlm")])
def test_no_logits_of_all_positions_exist_in_either_direction(model_type, objective, monkeypatch):
    monkeypatch.setitem(heads._ROWS, "cpu", 8)
    # Large enough that the logits are larger than anything else.
    model = small_model(model_type, objective, vocab_size=3000)
    batch, whole = batch_of(objective, boundaries=None), BATCH * SEQUENCE * 3000
    if objective == "mlm":
        batch = dataclasses.replace(batch, targets=torch.arange(0, 48, 2), target_ids=torch.arange(24))
    head = LossHead(model, CPU)
    with Sizes() as sizes:
        losses(head, batch, torch.float32).trained.backward()
    assert sizes.largest == 3000 * 32 < whole // 1.4  # the weight's gradient
    with Sizes() as sizes, torch.no_grad():
        losses(head, batch, torch.float32)
    assert sizes.largest <= 3000 * 32


@pytest.mark.parametrize("model_type", MLM)
def test_every_module_of_a_masked_lm_head_runs_on_targets_only(model_type):
    model, batch, seen = small_model(model_type, "mlm"), batch_of("mlm"), []
    head = LossHead(model, CPU)
    for name, module in model.named_modules():
        if not name.startswith(model.base_model_prefix):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    losses(head, batch, torch.float32)
    shapes = [arguments[0].shape[:-1] for arguments in seen[1:]]  # the first is the model's own call
    assert len(shapes) >= 4 and set(shapes) == {(1, 9)}


@pytest.mark.parametrize(("model_type", "objective"), [("gpt2", "causal"), ("bert", "mlm")])
def test_a_model_with_a_head_is_the_same_model_elsewhere(model_type, objective):
    model = small_model(model_type, objective).eval()
    ids, names = batch_of(objective).input_ids, list(model.state_dict())
    before = model(input_ids=ids).logits
    head = LossHead(model, CPU)
    losses(head, batch_of(objective), torch.float32)
    assert torch.equal(model(input_ids=ids).logits, before) and list(model.state_dict()) == names
    with pytest.raises(RuntimeError, match="index 96 is out of bounds"):
        losses(head, batch_of(objective, target_ids=torch.full((BATCH * SEQUENCE,), VOCABULARY), targets=None), None)
    assert torch.equal(model(input_ids=ids).logits, before) and not model.training


def test_evaluation_has_the_losses_of_training_without_a_graph():
    head = LossHead(small_model("gpt2", "causal"), CPU)
    batch = batch_of("causal")
    trained = losses(head, batch, torch.float32)
    with torch.no_grad():
        found = losses(head, batch, torch.float32)
    assert trained.trained.requires_grad and not found.trained.requires_grad
    assert not trained.of_tokens.requires_grad and torch.equal(found.of_tokens, trained.of_tokens)


@pytest.mark.parametrize(
    ("model_type", "objective", "changes"),
    [("gpt2", "causal", {}), ("bert", "mlm", {}), ("granite", "causal", {"logits_scaling": 3.0})],
)
def test_evaluation_says_which_targets_have_the_highest_logit(model_type, objective, changes, short_chunks):
    """Granite keeps its logits. Half of the targets are made the likeliest."""
    model = small_model(model_type, objective, **changes).eval()
    batch = batch_of(objective, boundaries=None)
    likeliest = model(input_ids=batch.input_ids).logits.argmax(-1).flatten()
    likeliest = likeliest if batch.targets is None else likeliest[batch.targets]
    ids = batch.target_ids.flatten()
    ids = torch.where(torch.arange(len(ids)) % 2 == 0, likeliest, ids)
    head = LossHead(model, CPU)
    batch = dataclasses.replace(batch, target_ids=ids)
    with torch.no_grad():
        found = losses(head, batch, torch.float32)
    assert torch.equal(found.correct, ids == likeliest) and 0.4 < found.correct.float().mean() < 0.8
    assert losses(head, batch, torch.float32).correct is None


def test_gradients_are_given_out_once():
    model = small_model("gpt2", "causal")
    found = losses(LossHead(model, CPU), batch_of("causal"), torch.float32).trained
    found.backward(retain_graph=True)
    with pytest.raises(AttributeError, match="gradients"):
        found.backward()


def test_under_autocast_products_are_in_its_precision_and_gradients_in_the_weights(short_chunks):
    hidden, weight, bias = torch.randn(20, 32), torch.randn(50, 32), torch.randn(50)
    ids = torch.randint(50, (20,))

    def run(function):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16):
            value = function(inputs)
        value.backward()
        return [value, *(tensor.grad for tensor in inputs)]

    def of_logits(inputs):
        return functional.cross_entropy(functional.linear(*inputs).float(), ids, reduction="sum")

    for found, expected in zip(run(lambda i: linear_cross_entropy(*i, ids)[0]), run(of_logits), strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < 5e-3
