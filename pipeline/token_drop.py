"""Random layer-token drop: every middle layer works on a random part of a sample's tokens; the others pass it by.

Yao et al. 2022, "Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-scale
Transformers": each layer draws its own tokens, the first and the last layer see them all, and the number kept grows
linearly to the whole sample. A kept token keeps its position, its order and its document.

What is DeepSpeed's here (its data efficiency library, `data_efficiency.data_routing.random_ltd`): the schedule of
RandomLTDScheduler and the names of its settings. Its RandomLayerTokenDrop is not used. Its kernels are for CUDA alone
(on a CPU rank: "ValueError: This op had not been implemented on CPU backend."), and `token_sort_` holds 2,048 tokens.
Its draws come from the rank's global generator, so that they change with the world size and the micro-batch and no
checkpoint keeps them. It knows one mask but neither rotary embeddings nor documents, and as a module around each layer
it renames the weights. Here a draw is a hash of the sample's key, the layer and the position, and indexing is torch's.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.randomness import UInt64, hash64, hash64_rows
from pipeline.attention import is_causal_model, visibility, window_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_TOKEN_DROP = 7  # first coordinate of the draws; see pipeline.samples for the others
_REMEDY = "leave curriculum.token_drop out"


def kept_tokens(step: int, sequence: int, *, min_value: int, require_steps: int, seq_per_step: int) -> int:
    """Tokens of a sample that a middle layer sees at a step: RandomLTDScheduler's "fixed_linear" from min_value to
    `sequence` (its max_value) over require_steps steps, rounded down to a multiple of seq_per_step.

    min_value: a multiple of seq_per_step, below `sequence`.
    """
    grown = int(step / require_steps * (sequence - min_value) + min_value)
    return min(grown - grown % seq_per_step, sequence)


@dataclass(frozen=True)
class TokenDrop:
    """What is dropped when, in a model of `layers` layers that drop; the other numbers as in `kept_tokens`."""

    layers: int
    min_value: int
    require_steps: int
    seq_per_step: int

    def positions(self, keys: UInt64, step: int, sequence: int) -> NDArray[np.int32] | None:
        """`kept_positions` of rows of `sequence` tokens at a step; None where every layer sees them all."""
        kept = kept_tokens(
            step,
            sequence,
            min_value=self.min_value,
            require_steps=self.require_steps,
            seq_per_step=self.seq_per_step,
        )
        return kept_positions(keys, self.layers, sequence, kept) if kept < sequence else None


def kept_positions(keys: UInt64, layers: int, sequence: int, kept: int) -> NDArray[np.int32]:
    """The positions that each of `layers` middle layers keeps of each sample, ascending: int32 [layers, batch, kept].

    keys: hashes of the samples [batch]. What is drawn for a sample follows from its key and the layer's number alone;
    every choice of `kept` out of `sequence` positions is as likely as any other.
    """
    of_layers = hash64(_TOKEN_DROP, keys, np.arange(layers)[:, None])
    hashes = hash64_rows(of_layers.reshape(-1), sequence).reshape(layers, len(keys), sequence)
    chosen = np.argpartition(hashes, kept - 1, axis=-1)[..., :kept].astype(np.int32)
    chosen.sort(axis=-1)
    return chosen


def install(model: "PreTrainedModel") -> int:
    """Makes the layers of a model take `kept_positions`, and returns how many of them drop tokens: all but two.

    In training, model(input_ids, kept_positions=...) with int32 [layers, batch, kept] runs each middle layer on its
    positions; without the argument, and in evaluation, the model is as it was. Names of weights stay as they are.

    Raises UserError for an architecture that is not one stack of layers which get the arguments of a call.
    """
    layers, config = _layers(model), model.config
    causal = is_causal_model(config)
    window = window_of(config, causal)
    types = getattr(config.get_text_config(), "layer_types", None) or ["sliding_attention"] * len(layers)
    for number, (layer, layer_type) in enumerate(zip(layers, types, strict=True)):
        index = number - 1 if 0 < number < len(layers) - 1 else None
        view = functools.partial(_Kept, causal=causal, window=window if layer_type == "sliding_attention" else None)
        layer.forward = MethodType(_forward_of(type(layer), index, view), layer)
    return len(layers) - 2


def _layers(model: "PreTrainedModel") -> "torch.nn.ModuleList":
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    count = model.config.get_text_config().num_hidden_layers
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    # Models with this mark hand the keyword arguments of a call on to every layer.
    if len(stacks) != 1 or not model._supports_attention_backend:
        raise UserError(
            f"curriculum.token_drop: {model.config.model_type} is not one stack of {count} layers that get the"
            f" arguments of a call, as gpt2, llama, bert and modernbert are; {_REMEDY}"
        )
    if count < 3:
        raise UserError(
            f"curriculum.token_drop: the model has {count} layers, of which the first and the last see all tokens;"
            f" expected at least 3; {_REMEDY}"
        )
    return stacks[0]


def _forward_of(layer_class: Any, index: int | None, view: Callable[..., "_Kept"]) -> Callable[..., "torch.Tensor"]:
    """A layer's forward that drops tokens as middle layer `index`, or only takes the argument away (None).

    It stands on the instance, in front of the class's, which may checkpoint: tokens are chosen outside of what is
    computed again.
    """
    names = list(inspect.signature(layer_class.forward).parameters)[2:]  # without self and the hidden states

    def forward(
        layer: Any, hidden_states: "torch.Tensor", *args: Any, kept_positions: Any = None, **kwargs: Any
    ) -> "torch.Tensor":
        if kept_positions is None or index is None or not layer.training:
            return layer_class.forward(layer, hidden_states, *args, **kwargs)
        batch, sequence, width = hidden_states.shape
        kept = view(kept_positions[index].long(), sequence)
        flat = kept.flat
        output = layer_class.forward(
            layer,
            hidden_states.flatten(0, 1).index_select(0, flat).view(batch, -1, width),
            *(kept.argument(name, value) for name, value in zip(names, args, strict=False)),
            **{name: kept.argument(name, value) for name, value in kwargs.items()},
        )
        return hidden_states.flatten(0, 1).index_copy(0, flat, output.flatten(0, 1)).view_as(hidden_states)

    return forward


@dataclass(frozen=True)
class _Kept:
    """The tokens that one layer sees. positions: int64 [batch, kept], out of `sequence`. causal, window: whom a token
    of the layer sees (pipeline.attention.sees)."""

    positions: "torch.Tensor"
    sequence: int
    causal: bool
    window: int | None

    @property
    def rows(self) -> "torch.Tensor":
        """int64 [batch, 1]"""
        import torch

        return torch.arange(len(self.positions), device=self.positions.device)[:, None]

    @property
    def flat(self) -> "torch.Tensor":
        """Positions in the flattened batch, ascending [batch x kept]."""
        return (self.rows * self.sequence + self.positions).flatten()

    def argument(self, name: str, value: Any) -> Any:
        """What the layer gets for one of its arguments; raises UserError where that is not known."""
        import torch

        sequence, cut = self.sequence, None
        match name, value:
            case "longest_document", int():
                return min(value, self.positions.shape[1])
            case _, None | bool() | int() | float() | str():
                return value
            case "attention_mask", _:
                cut = self._mask(value)
            case "position_ids", torch.Tensor(shape=(_, length)) if length == sequence:
                cut = self._of_rows(value)
            case "position_embeddings", (torch.Tensor(shape=(_, length, _)), torch.Tensor()) if length == sequence:
                cut = tuple(self._of_rows(tensor) for tensor in value)
        if cut is None:
            found = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise UserError(
                f"curriculum.token_drop: the model's layers take {name} ({found}), and what of it belongs to some of"
                f" the tokens is not known; {_REMEDY}"
            )
        return cut

    def _of_rows(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """[batch or 1, sequence, ...] to [batch, kept, ...]"""
        return tensor.expand(len(self.positions), *tensor.shape[1:])[self.rows, self.positions]

    def _mask(self, mask: Any) -> "torch.Tensor | None":
        """A mask of pipeline.attention's kinds for the kept tokens; None for another.

        Windows are stretches of the whole sample. varlen_attn would count kept tokens, so SDPA with a mask takes over;
        also from FlexAttention, whose block mask would have to be made anew for every layer.
        """
        import torch
        from torch.nn.attention.flex_attention import BlockMask

        places = self.rows[..., None, None], 0, self.positions[:, None, :, None], self.positions[:, None, None, :]
        if isinstance(mask, BlockMask):
            return mask.mask_mod(*places)
        if mask.dtype == torch.int32:
            boundaries = mask.flatten()
            if self.window is None or self.window >= self.sequence:
                return torch.searchsorted(self.flat, boundaries.long(), out_int32=True).view_as(mask)
            starts = torch.repeat_interleave(
                boundaries[:-1], boundaries.diff(), output_size=self.positions.shape[0] * self.sequence
            )
            return visibility(starts.view(-1, self.sequence), self.causal, self.window)(*places)
        if mask.shape[1:] == (1, self.sequence, self.sequence):
            return mask.expand(len(self.positions), -1, -1, -1)[places]
        return None
