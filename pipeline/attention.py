"""Attention in which the documents packed into one sample do not see each other.

What isolates them travels as the 4D `attention_mask` of the model's forward, which transformers' mask functions hand on
to every layer as it is (masking_utils.py, `_preprocess_mask_arguments`). The attention function that is registered here
reads from its kind which kernel is meant:

    bool [batch, 1, sequence, sequence]     SDPA, on CPUs and where there is dropout in attention
    int32 [1, 1, 1, documents + 1]          varlen_attn: the boundaries themselves, no mask at all
    BlockMask                               FlexAttention: float32, head sizes and GPUs that varlen_attn does not take
    none                                    plain attention, exactly transformers' "sdpa"

On CPUs, where SDPA's kernels have no dropout, pipeline.dropout takes over when there is dropout in attention.

On CPUs one masked call costs what plain attention costs, since the kernel skips nothing: forward and backward of a
whole model take between 1 % less and 2 % more with it (demo-gpt, demo-bert, bert-base at 512 tokens; 2 to 6 documents a
row; float32 and bfloat16). A call a document takes 3 to 7 % less at 512 tokens, but up to 8 % more at 128: one way for
all. Making the mask takes less than 1 ms a batch.

Not run for want of a GPU: varlen_attn itself and the compiled FlexAttention. Tests check the arguments of the first
against its documentation with a stand-in, and the mask of the second with torch's uncompiled FlexAttention on a CPU.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from data_prep.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

IMPLEMENTATION = "document_sdpa"
"""The attn_implementation of models in training. transformers asks of names with "sdpa" that the model supports it."""

Kernel = Literal["SDPA", "varlen_attn", "FlexAttention"]

_REMEDY = "set data.document_attention to false (and leave curriculum.start_length and padded packings out)"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# They use the mask or neighbouring tokens in ways of their own: ESM's embeddings count masked tokens over the row,
# MobileBERT's take in both neighbours, Moshi's and UltraBERT's masks are made by themselves.
_MIXING = {"esm", "mobilebert", "moshi", "ultrabert"}
_DROPOUTS = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
# Arguments of attention functions that change the scores, which varlen_attn cannot.
_SCORE_CHANGES = ("softcap", "s_aux", "position_bias")
# Their first position is the one behind the padding id (fairseq's make_positions).
_POSITIONS_BEHIND_PADDING = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


def register() -> str:
    """Makes IMPLEMENTATION known to transformers, and returns it: what models are to be built with."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, document_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    return IMPLEMENTATION


def check_supported(config: "PretrainedConfig") -> None:
    """Raises UserError for an architecture that cannot keep documents apart: one that does not take position_ids and
    4D masks to attention layers of transformers' interface, or has other layers that mix tokens."""
    model_class = _model_class(config)
    text = config.get_text_config()
    other = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if not (model_class._supports_attention_backend and model_class._supports_sdpa):
        reason = "its attention does not go through transformers' attention interface"
    elif "position_ids" not in inspect.signature(model_class.forward).parameters:
        reason = "it takes no position_ids"
    elif config.model_type in _MIXING:
        reason = "it lets tokens see one another outside of attention's mask"
    elif other:
        reason = f"it has layers of type {', '.join(sorted(other))}"
    else:
        return
    raise UserError(
        f"data.document_attention: the documents of a sample cannot be kept apart in a {config.model_type} model, since"
        f" {reason}; {_REMEDY}"
    )


def check_isolation(model: Any, device: "torch.device", dtype: "torch.dtype") -> None:
    """Runs a model, or the engine around it, on a sample of two documents, and raises UserError if the second's logits
    change with the first's tokens: the proof for this architecture and this device, before a run begins.

    Where documents are apart, the change is 0, or rounding in mixtures of experts (1e-7 of the first's own change).
    Where they are not, it is at least 1e-2 of that, also with initial weights. All ranks call it together.
    """
    import torch

    config = getattr(model, "module", model).config
    half, vocabulary = 8, config.get_text_config().vocab_size
    boundaries = torch.tensor([0, half, 2 * half], dtype=torch.int32, device=device)
    arguments = document_arguments(boundaries, half, (1, 2 * half), config, dtype)
    tokens = torch.arange(2 * half, device=device)[None]
    training = model.training
    model.eval()
    with torch.no_grad():
        one, other = (  # the output's first field: logits, by whatever name
            model(input_ids=torch.where(tokens < half, tokens + shift, tokens) % vocabulary, **arguments)[0].float()
            for shift in (0, vocabulary // 2)
        )
    model.train(training)
    first, second = (one - other)[0].abs().split(half)
    if not second.max() <= 1e-3 * first.max():
        raise UserError(
            f"data.document_attention: documents of a {config.model_type} model see each other on {device.type} (the"
            f" logits of one change by {float(second.max()):g} with the tokens of another); {_REMEDY}"
        )


def choose_kernel(device: "torch.device", dtype: "torch.dtype", config: "PretrainedConfig") -> Kernel:
    """The kernel for a model that computes attention in `dtype` on `device`.

    varlen_attn is FlashAttention 2: half precision, NVIDIA's Ampere or later, head sizes that are multiples of 8, here
    up to 192 (above, its backward pass needs the large GPUs). FlexAttention takes head sizes from 16. Neither has
    dropout, nor a backward pass that gives the same bits every time, as torch's deterministic algorithms are to.
    """
    import torch

    if device.type != "cuda" or _dropout(config) > 0 or torch.are_deterministic_algorithms_enabled():
        return "SDPA"
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if (
        dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
        and head_size % 8 == 0
        and head_size <= 192
        and not hasattr(text, "v_head_dim")
    ):
        return "varlen_attn"
    return "FlexAttention" if head_size >= 16 else "SDPA"


def describe(device: "torch.device", dtype: "torch.dtype", config: "PretrainedConfig") -> str:
    """How documents are kept apart, for the log: one phrase."""
    kernel = choose_kernel(device, dtype, config)
    if device.type == "cpu" and _dropout(config) > 0:
        return "document attention with dropout in blocks of queries"
    if device.type == "cuda" and (dropout := _dropout(config)) > 0:
        return f"document attention by {kernel} with a mask (attention dropout is {dropout:g}, others have none)"
    if device.type == "cuda" and kernel == "SDPA":
        return "document attention by SDPA with a mask (others are not deterministic, or do not take the head size)"
    return f"document attention by {kernel}"


def document_arguments(
    boundaries: "torch.Tensor | None",
    longest: int,
    batch_shape: tuple[int, int],
    config: "PretrainedConfig",
    dtype: "torch.dtype",
) -> dict[str, Any]:
    """Keyword arguments of model(input_ids [batch, sequence], use_cache=False, ...) that keep documents apart.

    boundaries: int32 [documents + 1], where documents begin in the flattened batch, each row's start among them, and
    its size; None for plain attention. A batch with one document a row needs none either. longest: tokens of the
    longest document. batch_shape: (batch, sequence). dtype: of the attention's inputs.
    """
    import torch

    batch, sequence = batch_shape
    if boundaries is None or len(boundaries) == batch + 1:
        return {}
    starts = torch.repeat_interleave(boundaries[:-1], boundaries.diff(), output_size=batch * sequence)
    positions = torch.arange(batch * sequence, device=starts.device) - starts + first_position(config)
    arguments: dict[str, Any] = {"position_ids": positions.view(batch, sequence)}
    kernel = choose_kernel(boundaries.device, dtype, config)
    if kernel == "varlen_attn":
        return arguments | {"attention_mask": boundaries.view(1, 1, 1, -1), "longest_document": longest}
    causal, starts = is_causal_model(config), starts.view(batch, sequence)
    make = _dense_mask if kernel == "SDPA" else _block_mask
    window = window_of(config, causal)
    if window is None or window >= longest:
        mask = make(starts, visibility(starts, causal, None))
    else:
        mask = make(starts, visibility(starts, causal, window))
        if getattr(config.get_text_config(), "layer_types", None):  # such models take a mask a type
            mask = {"full_attention": make(starts, visibility(starts, causal, None)), "sliding_attention": mask}
    return arguments | {"attention_mask": mask}


def document_attention(
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: Any,
    longest_document: int | None = None,
    **kwargs: Any,
) -> "tuple[torch.Tensor, torch.Tensor | None]":
    """An attention function of transformers' interface; see the module's docstring for the kinds of attention_mask.

    query [batch, heads, sequence, head size]; key, value [batch, key-value heads, sequence, head size]; returns
    [batch, sequence, heads, head size] and None. Raises UserError for scores that varlen_attn cannot compute.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        boundaries = attention_mask.flatten()
        longest = query.shape[2] if longest_document is None else longest_document
        return _varlen_attention(module, query, key, value, boundaries, longest, **kwargs), None
    if query.device.type == "cpu" and kwargs.get("dropout"):
        output = _cpu_attention(module, query, key, value, attention_mask, **kwargs)
        if output is not None:
            return output, None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _cpu_attention(
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    mask: "torch.Tensor | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> "torch.Tensor | None":
    """Attention with dropout [batch, sequence, heads, head size]; None where SDPA has to compute it."""
    import torch

    from pipeline.dropout import attention

    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    heads, sequence, size = query.shape[1:]
    if (
        not 0 < dropout < 1
        or query.dtype not in (torch.float32, torch.bfloat16)
        or key.shape[2] != sequence
        or not (mask is None or (mask.dtype == torch.bool and mask.shape[1:] == (1, sequence, sequence)))
        or any(kwargs.get(name) is not None for name in _SCORE_CHANGES)
    ):
        return None
    if key.shape[1] != heads:
        key, value = (tensor.repeat_interleave(heads // key.shape[1], 1) for tensor in (key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal:
        mask = torch.ones(1, 1, sequence, sequence, dtype=torch.bool).tril()
    return attention(query, key, value, mask, size**-0.5 if scaling is None else scaling, dropout)


def _varlen_attention(
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    boundaries: "torch.Tensor",
    longest: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> "torch.Tensor":
    from torch.nn.attention import varlen

    for name in _SCORE_CHANGES:
        if kwargs.get(name) is not None:
            raise UserError(f"data.document_attention: varlen_attn has no {name}, which the model asks for; {_REMEDY}")
    batch, heads, sequence, size = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # transformers' window counts the token itself, torch's does not.
    reach = -1 if sliding_window is None else sliding_window - 1
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    output = varlen.varlen_attn(
        query,
        key,
        value,
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(reach, 0 if causal else reach),
        enable_gqa=key.shape[1] != heads,
    )
    return output.view(batch, sequence, heads, size)


def visibility(starts: "torch.Tensor", causal: bool, window: int | None) -> Callable[..., "torch.Tensor"]:
    """FlexAttention's mask_mod, for index tensors of any shape: whether a query sees a key.

    starts [batch, sequence]: where the document of each token begins. window: tokens to either side, itself among them.
    """

    def sees(row: Any, head: Any, query: Any, key: Any) -> "torch.Tensor":
        seen = starts[row, query] == starts[row, key]
        if causal:
            seen = seen & (key <= query)
        if window is not None:
            seen = seen & ((query - key).abs() < window)
        return seen

    return sees


def _dense_mask(starts: "torch.Tensor", sees: Callable[..., "torch.Tensor"]) -> "torch.Tensor":
    """bool [batch, 1, sequence, sequence]"""
    import torch

    rows, tokens = (torch.arange(size, device=starts.device) for size in starts.shape)
    return sees(rows[:, None, None, None], 0, tokens[:, None], tokens)


def _block_mask(starts: "torch.Tensor", sees: Callable[..., "torch.Tensor"]) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, sequence = starts.shape
    device = starts.device
    mask = create_block_mask(sees, batch, None, sequence, sequence, device=device, _compile=device.type == "cuda")
    mask.ndim = 4  # GPT-2 asks a mask for it
    return mask


def window_of(config: "PretrainedConfig", causal: bool) -> int | None:
    """Tokens that a layer with a sliding window sees to either side, itself among them; None without such layers.

    configuration.sliding_window means that for causal models, and one less for the others (masking_utils.py,
    `sliding_window_overlay` and `sliding_window_bidirectional_overlay`).
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if window is None or "sliding_attention" not in (getattr(text, "layer_types", None) or ("sliding_attention",)):
        return None
    return int(window) if causal else int(window) + 1


def _dropout(config: "PretrainedConfig") -> float:
    return float(max(getattr(config.get_text_config(), name, 0.0) for name in _DROPOUTS))


def first_position(config: "PretrainedConfig") -> int:
    return config.pad_token_id + 1 if config.model_type in _POSITIONS_BEHIND_PADDING else 0


def is_causal_model(config: "PretrainedConfig") -> bool:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)


def _model_class(config: "PretrainedConfig") -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    return (MODEL_FOR_CAUSAL_LM_MAPPING if is_causal_model(config) else MODEL_FOR_MASKED_LM_MAPPING)[type(config)]
