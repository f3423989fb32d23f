"""The loss of a batch: the sum over its target tokens, to be divided by the target tokens of the global batch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def loss_sum(
    model: Any, input_ids: "torch.Tensor", labels: "torch.Tensor", targets: "torch.Tensor | None" = None
) -> "torch.Tensor":
    """Sum of the cross-entropies (nats, float32, scalar) of labels [batch, sequence] given input_ids
    [batch, sequence]. The same for both objectives: the labels are aligned with the logits.

    targets: positions [targets] in the flattened batch whose labels count, in increasing order; None for all of them.
    Masked LM has one in seven: the float32 copy and the softmax of the others' logits are spared.
    """
    from torch.nn import functional

    # No cache of keys and values, and no attention mask: every position of a sample is a token.
    config = getattr(model, "module", model).config
    arguments = {"use_cache": False} if getattr(config, "use_cache", False) else {}
    logits = model(input_ids=input_ids, **arguments).logits.flatten(0, 1)
    labels = labels.flatten()
    if targets is not None:
        logits, labels = logits.index_select(0, targets), labels.index_select(0, targets)
    return functional.cross_entropy(logits.float(), labels, reduction="sum")
