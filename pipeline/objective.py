"""The losses of a batch: one a target token, and one a pair where a second objective asks for it."""

from typing import TYPE_CHECKING, Any

from pipeline.attention import document_arguments

if TYPE_CHECKING:
    import torch

    from pipeline.loader import DeviceBatch


def losses(model: Any, batch: "DeviceBatch", dtype: "torch.dtype") -> tuple["torch.Tensor", "torch.Tensor | None"]:
    """Cross-entropies in nats, float32: of each target token [targets], and of each pair's label [batch], 0 in rows
    that do not count (None without pairs).

    Targets are aligned with the logits for both objectives. Masked LM has one in seven: the float32 copy and the
    softmax of the others' logits are spared. dtype: that attention is computed in.
    """
    from torch.nn import functional

    config = getattr(model, "module", model).config
    batch_size, sequence = batch.input_ids.shape
    arguments = document_arguments(batch.boundaries, batch.longest, (batch_size, sequence), config, dtype)
    if getattr(config, "use_cache", False):
        arguments["use_cache"] = False
    if batch.token_types is not None:
        arguments["token_type_ids"] = batch.token_types
    if batch.kept_positions is not None:
        arguments["kept_positions"] = batch.kept_positions
    output = model(input_ids=batch.input_ids, **arguments)
    logits = (output.logits if batch.pair_labels is None else output.prediction_logits).flatten(0, 1)
    if batch.targets is not None:
        logits = logits.index_select(0, batch.targets)
    of_tokens = functional.cross_entropy(logits.float(), batch.target_ids.flatten(), reduction="none")
    if batch.pair_labels is None:
        return of_tokens, None
    pairs = output.seq_relationship_logits if "seq_relationship_logits" in output else output.sop_logits
    return of_tokens, functional.cross_entropy(pairs.float(), batch.pair_labels, reduction="none")
