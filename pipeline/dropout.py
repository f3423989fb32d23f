"""Dropout on CPUs, where torch draws 6 ns an element, and keeps all probabilities of attention with it and their mask.

Here a random number is a hash of a key and the element's place (data_prep/native/dropout.c), computed again on the way
back instead of kept. The key is drawn from torch's generator, so that its seed, and whatever sets its state, such as
activation checkpointing, mean what they mean for torch's own dropout. Attention is computed in blocks of queries, as in
FlashAttention (Dao et al. 2022, section 3.1), with torch's matrix products over those keys that a block sees. Scores,
softmax and the gradients of probabilities are float32, as in torch's kernels.

Forward and backward on one thread of an AMD EPYC with AVX-512, 12 heads of 64, a dropout of 0.1, torch's attention and
this one: 2 x 512 tokens 169 and 91 ms in float32, 168 and 76 ms in bfloat16; 1,024 tokens under a causal mask 377 and
106, 357 and 95 ms (torch's without dropout: 164 and 148). Dropout of 786,432 values: 5.5 and 0.3 ms.
"""

import ctypes
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep import native

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Queries of a block: the scores of 12 heads against 512 keys are 3 MB, which stay in the cache.
_QUERIES = 128


def attention(
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    visible: "torch.Tensor | None",
    factor: float,
    rate: float,
) -> "torch.Tensor":
    """softmax(query @ key.T x factor) with dropout of `rate`, times value: [batch, sequence, heads, head size].

    query, key, value: [batch, heads, sequence, head size], float32 or bfloat16. visible: bool [batch or 1, 1, sequence,
    sequence], whether a query sees a key; None: all do. A query that sees no key gets zeros.
    """
    if visible is not None:
        visible = visible.contiguous()
    output, _ = operators().attention(query, key, value, visible, _key(), factor, rate)
    return output


def dropout(values: "torch.Tensor", rate: float) -> "torch.Tensor":
    """values [...], float32 or bfloat16, of which a share of `rate` becomes 0 and the rest is divided by 1 - rate."""
    return operators().dropout(values, _key(), rate)


def use_in(model: "PreTrainedModel") -> None:
    """Gives the dropout modules of a model of transformers this dropout, for float32 and bfloat16 in training, and its
    SDPA this attention where there is dropout in it. Weights, their names and the model in evaluation stay as they are.
    """
    import torch
    from torch import nn

    from pipeline.attention import register

    _register()

    class Dropout(nn.Dropout):
        def forward(self, values: "torch.Tensor") -> "torch.Tensor":
            if self.training and 0 < self.p < 1 and values.dtype in (torch.float32, torch.bfloat16):
                return dropout(values, self.p)
            return super().forward(values)

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(register())


def _key() -> "torch.Tensor":
    import torch

    return torch.empty((), dtype=torch.int64).random_()


@functools.cache
def _kernels() -> ctypes.CDLL:
    kernels = native.load("dropout")
    pointer, size, real, bits, key = (
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_uint32, ctypes.c_uint64,
    )  # fmt: skip
    block: list[Any] = [size, size, size, pointer, size, real, key, size, size, size, bits, real]
    kernels.softmax_dropout.argtypes = [*block, *[pointer] * 3]
    kernels.softmax_dropout_backward.argtypes = [*block, real, *[pointer] * 6]
    kernels.dropout.argtypes = [size, ctypes.c_int32, key, bits, real, pointer, pointer]
    return kernels


@dataclass(frozen=True)
class _Drawn:
    """What is dropped: below `threshold` of 2^32 under a key; the rest is multiplied with `scale`."""

    key: int
    threshold: int
    scale: float

    @staticmethod
    def of(key: "torch.Tensor", rate: float) -> "_Drawn":
        return _Drawn(int(key), round(rate * 2**32), 1 / (1 - rate))


@dataclass(frozen=True)
class _Block:
    """Queries [first, end) of a row of the batch, and the keys [first_key, end_key) that they see."""

    row: int
    first: int
    end: int
    first_key: int
    end_key: int

    @property
    def queries(self) -> slice:
        return slice(self.first, self.end)

    @property
    def keys(self) -> slice:
        return slice(self.first_key, self.end_key)

    def arguments(
        self, shape: "torch.Size", visible: "torch.Tensor | None", factor: float, drawn: _Drawn
    ) -> tuple[Any, ...]:
        """Of the kernels, from `heads` to `scale`; shape: of the queries."""
        _, heads, sequence, _ = shape
        seen, stride = None, 0
        if visible is not None:
            seen = visible[self.row if len(visible) > 1 else 0, 0, self.first :, self.first_key :].data_ptr()
            stride = visible.stride(2)
        place = (drawn.key, self.row * heads * sequence + self.first, sequence, self.first_key)
        sizes = (heads, self.end - self.first, self.end_key - self.first_key)
        return *sizes, seen, stride, factor * math.log2(math.e), *place, drawn.threshold, drawn.scale


def _blocks(shape: "torch.Size", visible: "torch.Tensor | None") -> Iterator[_Block]:
    import torch

    batch, _, sequence, _ = shape
    bounds = [(first, min(first + _QUERIES, sequence)) for first in range(0, sequence, _QUERIES)]
    if visible is None:
        for row in range(batch):
            yield from (_Block(row, *block, 0, sequence) for block in bounds)
        return
    seen = torch.stack([visible[:, 0, first:end].any(1) for first, end in bounds], 1).byte()
    first_keys = seen.argmax(-1).expand(batch, -1).tolist()
    end_keys = (sequence - seen.flip(-1).argmax(-1)).expand(batch, -1).tolist()
    for row in range(batch):
        for number, (first, end) in enumerate(bounds):
            yield _Block(row, first, end, first_keys[row][number], end_keys[row][number])


class _Memory:
    """Scores of one block after the other, in the same pages: fresh ones cost more than what is computed in them."""

    def __init__(self, shape: "torch.Size", dtype: "torch.dtype") -> None:
        import torch

        _, self._heads, sequence, _ = shape
        self._values = torch.empty(self._heads * min(_QUERIES, sequence) * sequence, dtype=dtype)

    def of(self, block: _Block) -> "torch.Tensor":
        """[heads, queries, keys]"""
        shape = (self._heads, block.end - block.first, block.end_key - block.first_key)
        return self._values[: math.prod(shape)].view(shape)


def _forward(
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    visible: "torch.Tensor | None",
    factor: float,
    drawn: _Drawn,
) -> "tuple[torch.Tensor, torch.Tensor]":
    """The output [batch, sequence, heads, head size], and log2 of softmax's denominators [batch, sequence, heads]."""
    import torch

    shape, dtype = query.shape, query.dtype
    batch, heads, sequence, _ = shape
    output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    normalizers = torch.empty(batch, sequence, heads)
    scores = _Memory(shape, torch.float32)
    low = None if dtype == torch.float32 else _Memory(shape, dtype)
    row, queries, keys = -1, query, key
    for block in _blocks(shape, visible):
        if block.row != row:
            row = block.row
            queries, keys = query[row].float(), key[row].float()
        shares = scores.of(block)
        torch.bmm(queries[:, block.queries], keys[:, block.keys].transpose(1, 2), out=shares)
        of_block = torch.empty(heads, block.end - block.first)
        rounded = None if low is None else low.of(block)
        _kernels().softmax_dropout(
            *block.arguments(shape, visible, factor, drawn),
            shares.data_ptr(),
            None if rounded is None else rounded.data_ptr(),
            of_block.data_ptr(),
        )
        normalizers[row, block.queries] = of_block.t()
        product = torch.bmm(shares if rounded is None else rounded, value[row][:, block.keys])
        output[row, block.queries] = product.transpose(0, 1)
    return output, normalizers


def _backward(
    gradient: "torch.Tensor",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    visible: "torch.Tensor | None",
    output: "torch.Tensor",
    normalizers: "torch.Tensor",
    factor: float,
    drawn: _Drawn,
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """The gradients of query, key and value, of their shape."""
    import torch

    shape, dtype = query.shape, query.dtype
    heads, sequence, size = shape[1:]
    of_query, of_key, of_value = (
        torch.empty_like(output, memory_format=torch.contiguous_format).transpose(1, 2) for _ in range(3)
    )
    products = (gradient.float() * output.float()).sum(-1)
    scores, gradients = _Memory(shape, torch.float32), _Memory(shape, torch.float32)
    low = None if dtype == torch.float32 else (_Memory(shape, dtype), _Memory(shape, dtype))
    sums = torch.empty(2, heads, sequence, size)
    row, queries, keys, values, outward = -1, query, key, value, gradient
    for block in _blocks(shape, visible):
        if block.row != row:
            row = block.row
            queries, keys, values = (tensor[row].float() for tensor in (query, key, value))
            outward = gradient[row].transpose(0, 1).float()
            sums.zero_()
        part, seen = block.queries, block.keys
        shares, of_shares = scores.of(block), gradients.of(block)
        torch.bmm(queries[:, part], keys[:, seen].transpose(1, 2), out=shares)
        torch.bmm(outward[:, part], values[:, seen].transpose(1, 2), out=of_shares)
        rounded, of_rounded = (None, None) if low is None else (memory.of(block) for memory in low)
        of_rows = normalizers[row, part].t().contiguous(), products[row, part].t().contiguous()
        _kernels().softmax_dropout_backward(
            *block.arguments(shape, visible, factor, drawn),
            factor,
            *(tensor.data_ptr() for tensor in of_rows),
            shares.data_ptr(),
            of_shares.data_ptr(),
            None if rounded is None else rounded.data_ptr(),
            None if of_rounded is None else of_rounded.data_ptr(),
        )
        if rounded is None or of_rounded is None:
            rounded, of_rounded = shares, of_shares
        of_query[row][:, part] = torch.bmm(of_rounded, key[row][:, seen])
        turned = gradient[row].transpose(0, 1)
        sums[0, :, seen] += torch.bmm(of_rounded.transpose(1, 2), query[row][:, part])
        sums[1, :, seen] += torch.bmm(rounded.transpose(1, 2), turned[:, part])
        if block.end == sequence:
            of_key[row], of_value[row] = sums[0], sums[1]
    return of_query, of_key, of_value


def _attention(query: Any, key: Any, value: Any, visible: Any, drawn_by: Any, factor: float, rate: float) -> Any:
    return _forward(query, key, value, visible, factor, _Drawn.of(drawn_by, rate))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, visible: Any, *others: Any) -> Any:
    output, normalizers, drawn_by, factor, rate = others
    return _backward(gradient, query, key, value, visible, output, normalizers, factor, _Drawn.of(drawn_by, rate))


def _dropout(values: "torch.Tensor", drawn_by: "torch.Tensor", rate: float) -> "torch.Tensor":
    import torch

    drawn, values = _Drawn.of(drawn_by, rate), values.contiguous()
    output = torch.empty_like(values)
    is_bfloat16 = values.dtype == torch.bfloat16
    _kernels().dropout(
        values.numel(), is_bfloat16, drawn.key, drawn.threshold, drawn.scale, values.data_ptr(), output.data_ptr()
    )
    return output


def operators() -> Any:
    """The operators, which torch's autograd, activation checkpointing and compiler know."""
    import torch

    if not torch.compiler.is_compiling():  # which would trace the registration; `use_in` was there before
        _register()
    return torch.ops.pretraining


@functools.cache
def _register() -> None:
    import torch

    def operator(name: str, function: Any, schema: str, shapes: Any) -> Any:
        made = torch.library.custom_op(f"pretraining::{name}", function, mutates_args=(), schema=schema)
        made.register_fake(shapes)
        return made

    common = "Tensor query, Tensor key, Tensor value, Tensor? visible"
    last = "Tensor drawn_by, float factor, float rate"
    forward = operator(
        "attention",
        _attention,
        f"({common}, {last}) -> (Tensor, Tensor)",
        lambda query, *_: (
            torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format),
            query.new_empty(query.transpose(1, 2).shape[:3], dtype=torch.float32),
        ),
    )
    backward = operator(
        "attention_backward",
        _attention_backward,
        f"(Tensor gradient, {common}, Tensor output, Tensor normalizers, {last}) -> (Tensor, Tensor, Tensor)",
        lambda gradient, *_: tuple(torch.empty_like(gradient).transpose(1, 2) for _ in range(3)),
    )
    of_values = operator(
        "dropout",
        _dropout,
        "(Tensor values, Tensor drawn_by, float rate) -> Tensor",
        lambda values, *_: torch.empty_like(values, memory_format=torch.contiguous_format),
    )

    def keep_attention(ctx: Any, inputs: Any, output: Any) -> None:
        query, key, value, visible, drawn_by, ctx.factor, ctx.rate = inputs
        ctx.save_for_backward(query, key, value, visible, *output, drawn_by)

    def attention_back(ctx: Any, gradient: Any, _: Any) -> Any:
        return *backward(gradient, *ctx.saved_tensors, ctx.factor, ctx.rate), None, None, None, None

    def keep_draw(ctx: Any, inputs: Any, output: Any) -> None:
        _, drawn_by, ctx.rate = inputs
        ctx.save_for_backward(drawn_by)

    def dropout_back(ctx: Any, gradient: Any) -> Any:
        return of_values(gradient, *ctx.saved_tensors, ctx.rate), None, None

    forward.register_autograd(attention_back, setup_context=keep_attention)
    of_values.register_autograd(dropout_back, setup_context=keep_draw)
