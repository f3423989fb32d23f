"""The loss of a batch: the sum over its target tokens, to be divided by the target tokens of the global batch."""

from typing import TYPE_CHECKING, Any

from pipeline.samples import IGNORED

if TYPE_CHECKING:
    import torch


def loss_sum(model: Any, input_ids: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    """Sum of the cross-entropies (nats, float32, scalar) of labels [batch, sequence] given input_ids
    [batch, sequence]; labels of IGNORED are no targets. The same for both objectives: the labels are aligned.
    """
    from torch.nn import functional

    # No cache of keys and values, and no attention mask: every position of a sample is a token.
    config = getattr(model, "module", model).config
    arguments = {"use_cache": False} if getattr(config, "use_cache", False) else {}
    logits = model(input_ids=input_ids, **arguments).logits
    return functional.cross_entropy(
        logits.view(-1, logits.shape[-1]).float(), labels.view(-1), ignore_index=IGNORED, reduction="sum"
    )
