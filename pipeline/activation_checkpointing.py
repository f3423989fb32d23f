"""Activations computed again in the backward pass instead of kept: memory for time, same gradients.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". DeepSpeed's own checkpointing
(deepspeed.runtime.activation_checkpointing, the ds_config's section of that name) works for models that call it, which
those of transformers do not: they call torch's, through layers of their own.
"""

import functools
from typing import TYPE_CHECKING, Any, Literal

from data_prep.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Mode = Literal["none", "full", "selective"]


def check_stage(mode: Mode, zero_stage: int) -> None:
    """Raises UserError for selective checkpointing at stage 3: torch counts the operators of a layer, in the forward
    pass and when it is computed again, and those that gather its weights are not the same both times."""
    if mode == "selective" and zero_stage == 3:
        raise UserError(
            "model.activation_checkpointing is selective, which does not go with ZeRO stage 3, whose weights are"
            " gathered within the layers; take full, or a ds_config of stage 2"
        )


def enable(model: "PreTrainedModel", mode: Mode) -> None:
    """Makes the layers of a model compute activations again in training, under the same dropout.

    full: a layer keeps its input alone; the backward pass costs one more forward pass, a third of a step's FLOPs.
    selective: a layer also keeps what its matrix products and its attention gave; what is computed again (norms,
    activation functions, dropout) costs memory traffic but hardly FLOPs.

    Raises UserError for an architecture without checkpointed layers.
    """
    if mode == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _kept_operators())
    try:
        model.activation_checkpointing_enable(settings)
    except ValueError as error:
        raise UserError(f"model.activation_checkpointing is {mode}, but {error} Set it to none") from None


def _kept_operators() -> "list[torch._ops.OpOverload]":
    """Matrix products and attention. FlexAttention is no operator while it is compiled: it is computed again."""
    import torch
    from torch.nn.attention import varlen  # noqa: F401  (registers its operator)

    from pipeline import dropout

    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
        dropout.operators().attention.default,
    ]
