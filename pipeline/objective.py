"""The losses of a batch: of its target tokens, and of its pairs where a second objective asks for them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.attention import document_arguments
from pipeline.heads import LossHead

if TYPE_CHECKING:
    import torch

    from pipeline.loader import DeviceBatch


@dataclass(frozen=True)
class BatchLosses:
    """Of one micro-batch, in nats, float32.

    trained: the sum over the target tokens of what is trained, times a scale; a scalar, with gradients.
    of_tokens: plain cross-entropies [targets], without gradients.
    correct: whether the target has the highest logit [targets]; None where gradients are computed.
    of_pairs: of each pair's label, 0 in rows that do not count [batch], with gradients; None without pairs.
    """

    trained: "torch.Tensor"
    of_tokens: "torch.Tensor"
    correct: "torch.Tensor | None"
    of_pairs: "torch.Tensor | None"


def losses(head: LossHead, batch: "DeviceBatch", dtype: "torch.dtype", scale: float = 1.0) -> BatchLosses:
    """Runs the head's model on a batch. Targets are aligned with the positions for both objectives.

    dtype: that attention is computed in. scale: of `trained` alone.
    """
    from torch.nn import functional

    config = getattr(head.model, "module", head.model).config
    arguments = document_arguments(batch.boundaries, batch.longest, tuple(batch.input_ids.shape), config, dtype)
    if getattr(config, "use_cache", False):
        arguments["use_cache"] = False
    if batch.token_types is not None:
        arguments["token_type_ids"] = batch.token_types
    if batch.kept_positions is not None:
        arguments["kept_positions"] = batch.kept_positions
    trained, of_tokens, correct, output = head(
        batch.targets, batch.target_ids.flatten(), scale, input_ids=batch.input_ids, **arguments
    )
    if batch.pair_labels is None:
        return BatchLosses(trained, of_tokens, correct, None)
    logits = output.seq_relationship_logits if "seq_relationship_logits" in output else output.sop_logits
    pairs = functional.cross_entropy(logits.float(), batch.pair_labels, reduction="none")
    return BatchLosses(trained, of_tokens, correct, pairs)
