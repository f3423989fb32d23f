"""Embeddings padded to a multiple of so many rows, which matrix products on GPUs want, and stripped at export.

The rows that are added are zeros and stay zeros: the softmax leaves them out (`pipeline.heads`), so that their
gradients are 0, and no optimizer's rule moves a weight of 0 without gradients. Megatron-LM pads for the same reason
(`make_vocab_size_divisible_by`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def pad_vocabulary(model: Any, multiple: int) -> None:
    """Adds rows of zeros to the embeddings and the output projection of a transformers model, in place.

    The weights that are there stay as they are, and tied ones tied; the model's configuration then has the larger
    vocabulary. A model whose logits do not leave one nn.Linear over the vocabulary of its embeddings is left as it is.
    """
    from torch import nn

    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if type(inputs) is not nn.Embedding or type(outputs) is not nn.Linear:
        return
    size = inputs.num_embeddings
    rows = -size % multiple
    own = [inputs.weight, *outputs.parameters()]
    # A head's bias outside of the projection, such as ESM's, would no longer fit.
    known = {id(parameter) for parameter in [*own, *model.base_model.parameters()]}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    if not rows or outputs.out_features != size or any(len(one) == size for one in others):
        return
    grown = {id(one): nn.Parameter(_with_zeros(one.detach(), rows), one.requires_grad) for one in own}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in grown:
                setattr(module, name, grown[id(parameter)])
    inputs.num_embeddings = outputs.out_features = size + rows
    model.config.get_text_config().vocab_size = size + rows


def _with_zeros(tensor: "torch.Tensor", rows: int) -> "torch.Tensor":
    import torch

    return torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])


def strip_padding(
    weights: Mapping[str, "torch.Tensor"], shapes: Mapping[str, "torch.Tensor"]
) -> dict[str, "torch.Tensor"]:
    """The weights of a padded model cut to the sizes that the model has without padding.

    weights: by name. shapes: tensors of the same names, such as the state dict of the model on the meta device.
    """
    return {name: weight[: len(shapes[name])] if weight.ndim else weight for name, weight in weights.items()}
