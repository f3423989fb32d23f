"""Output heads without the logits of a whole micro-batch: hidden states are taken at the targets before the head, and
the output projection computes losses and gradients, some hundred targets at a time.

The projection's forward pass already computes the gradients, as Liger Kernel's fused linear cross-entropy does (Hsu et
al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training", section 3.2): they are linear in the factor that
backward brings, so no logits wait for it and none are computed twice. A model has this path where its logits leave the
projection as they are. Where they are capped or scaled afterwards (Gemma, Cohere, Granite), where the projection is no
nn.Linear (tensor parallelism) or is not called (MobileBERT), only the choice of hidden states remains, and where the
head needs all positions, not even that: `LossHead` finds out by trying.
"""

import functools
import math
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Rows of logits held at once. CPUs: with 64 to 128 rows the matrix products take up to twice as long in bfloat16, with
# more than 1,024 the logits leave the cache. GPUs: 0.6 GB at 50,257 words, where adding up the weight's gradient moves
# a fifth of the bytes of a chunk's softmax; not measured.
_ROWS = {"cpu": 512}
ROWS_OF_GPUS = 2048


def linear_cross_entropy(
    hidden: "torch.Tensor",
    weight: "torch.Tensor",
    bias: "torch.Tensor | None",
    target_ids: "torch.Tensor",
    *,
    scale: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocabulary: int | None = None,
    rows: int | None = None,
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]":
    """`scale` times the sum of what is trained, as `trained_loss` defines it (float32, differentiable once), and the
    plain cross-entropies in nats (float32 [targets], without gradients), of logits hidden @ weight.T + bias; and where
    no gradients are computed, which targets have the highest of their logits (bool [targets]).

    hidden [targets, width], weight [vocabulary, width], bias [vocabulary], target_ids int64 [targets]. Softmax and the
    sums over chunks are in float32. scale: what backward would multiply with; given here, it is part of the matrix
    products and costs no rounding of its own. vocabulary: rows of the weight that count; those behind them are padding,
    which the softmax leaves out. rows: of logits held at once.
    """
    import torch

    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = _ROWS.get(hidden.device.type, ROWS_OF_GPUS) if rows is None else rows
    with torch.autocast(hidden.device.type, enabled=False):
        options = (scale, z_loss, label_smoothing, vocabulary, rows)
        if not torch.is_grad_enabled():
            return _chunked(False, hidden, weight, bias, target_ids, *options)[:3]
        total, losses = _linear_cross_entropy().apply(hidden, weight, bias, target_ids, *options)
    return total, losses, None


def trained_loss(
    logits: "torch.Tensor", target_ids: "torch.Tensor", z_loss: float, label_smoothing: float
) -> "torch.Tensor":
    """The loss of each target [targets] whose gradients train the model, from logits [targets, vocabulary].

    Cross-entropy against (1 - label_smoothing) x the target + label_smoothing x the uniform distribution (Szegedy et
    al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7), plus z_loss x log^2 Z (Chowdhery
    et al. 2022, "PaLM", section 5), where Z is the softmax's denominator.
    """
    from torch.nn import functional

    losses = functional.cross_entropy(logits, target_ids, reduction="none", label_smoothing=label_smoothing)
    return losses + z_loss * logits.logsumexp(-1).square() if z_loss else losses


@functools.cache
def _linear_cross_entropy() -> Any:
    import torch
    from torch.autograd.function import once_differentiable

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            total, losses, _, ctx.exponent, ctx.gradients = _chunked(True, *arguments)
            ctx.dtype = arguments[0].dtype
            ctx.mark_non_differentiable(losses)
            return total, losses

        @staticmethod
        @once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, factor: Any, _: Any) -> Any:
            factor = factor * 2.0**ctx.exponent
            gradients = ctx.gradients
            del ctx.gradients  # they are changed in place: a second backward pass is to fail
            return *(None if one is None else one.mul_(factor).to(ctx.dtype) for one in gradients), *(None,) * 6

    return LinearCrossEntropy


def _chunked(
    with_gradients: bool,
    hidden: "torch.Tensor",
    weight: "torch.Tensor",
    bias: "torch.Tensor | None",
    target_ids: "torch.Tensor",
    scale: float,
    z_loss: float,
    label_smoothing: float,
    vocabulary: int | None,
    rows: int,
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int, tuple[torch.Tensor | None, ...]]":
    """What `linear_cross_entropy` returns, and the trained sum's gradients of hidden, weight and bias, divided by
    2^exponent: what is left of `scale` is between 1/2 and 1, so that float16 loses none."""
    import torch

    targets, padded, dtype, device = len(hidden), len(weight), hidden.dtype, hidden.device
    vocabulary = vocabulary or padded
    mantissa, exponent = math.frexp(scale)
    chunks = max(1, -(-targets // rows))
    rows = -(-targets // chunks)
    losses = torch.empty(targets, dtype=torch.float32, device=device)
    correct = None if with_gradients else torch.empty(targets, dtype=torch.bool, device=device)
    total = torch.zeros((), dtype=torch.float32, device=device)
    # Kept from chunk to chunk: on CPUs fresh pages cost more than what is computed in them.
    logits = torch.empty(rows, padded, dtype=dtype, device=device)
    shares = logits if dtype == torch.float32 else torch.empty(rows, padded, dtype=torch.float32, device=device)
    of_hidden, of_weight, of_bias, product = None, None, None, None
    if with_gradients:
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.empty_like(weight, dtype=dtype if chunks == 1 else torch.float32)
        product = of_weight if of_weight.dtype == dtype else torch.empty_like(weight)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    for chunk in range(chunks):
        part = slice(chunk * rows, (chunk + 1) * rows)
        inputs, ids = hidden[part], target_ids[part, None]
        low, full = logits[: len(inputs)], shares[: len(inputs)]
        if bias is None:
            torch.mm(inputs, weight.t(), out=low)
        else:
            torch.addmm(bias, inputs, weight.t(), out=low)
        if full is not low:
            full.copy_(low)
        full[:, vocabulary:] = -math.inf  # shares and gradients of exactly 0
        of_targets, highest = full.gather(1, ids), full.amax(1, keepdim=True)
        if correct is not None:
            torch.eq(full.argmax(1), ids[:, 0], out=correct[part])
        mean = full[:, :vocabulary].mean(1, keepdim=True) if label_smoothing else None
        torch.softmax(full, 1, out=full)
        # The highest logit's share is 1 / sum(exp(logits - highest)): half the time of log_softmax and exp.
        log_z = highest - full.amax(1, keepdim=True).log()
        of_part = log_z - of_targets
        losses[part] = of_part[:, 0]
        if mean is not None:
            of_part = of_part.lerp(log_z - mean, label_smoothing)
        total += (of_part + z_loss * log_z.square()).sum()
        if of_hidden is None or of_weight is None or product is None:
            continue
        if z_loss:
            full.mul_(1 + 2 * z_loss * log_z)
        if label_smoothing:
            full[:, :vocabulary].sub_(label_smoothing / vocabulary)
        full.scatter_add_(1, ids, torch.full_like(of_targets, label_smoothing - 1))
        if of_bias is not None:
            of_bias.add_(full.sum(0), alpha=mantissa)
        if dtype != torch.float32:
            low.copy_(full)
        torch.addmm(of_hidden[part], low, weight, beta=0, alpha=mantissa, out=of_hidden[part])
        if product is of_weight:
            torch.addmm(of_weight, low.t(), inputs, beta=min(chunk, 1), alpha=mantissa, out=of_weight)
        else:
            torch.addmm(product, low.t(), inputs, beta=0, alpha=mantissa, out=product)
            of_weight.add_(product) if chunk else of_weight.copy_(product)
    return total * scale, losses, correct, exponent, (of_hidden, of_weight, of_bias)


class LossHead:
    """The head of one model, whose modules it changes: what they compute while it is called. At other times, and in its
    weights and their names, the model stays what it was.

    model: of transformers, or the engine around it; all ranks make theirs together, since that runs the model twice.
    device: that it computes on. vocabulary: logits that count, where those behind them are padding. z_loss,
    label_smoothing: as in `trained_loss`. selects: hidden states are taken at the
    targets before the head. fuses: no logits leave the output projection.
    """

    def __init__(
        self,
        model: Any,
        device: "torch.device",
        *,
        vocabulary: int | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        from torch import nn

        self.model = model
        self.vocabulary = vocabulary
        self._z_loss, self._label_smoothing = z_loss, label_smoothing
        # Of the call that is running.
        self._targets: torch.Tensor | None = None
        self._target_ids: torch.Tensor | None = None
        self._scale = 1.0
        self._of_tokens: torch.Tensor | None = None
        self._correct: torch.Tensor | None = None
        module = getattr(model, "module", model)
        projection = module.get_output_embeddings()
        selection = module.base_model.register_forward_hook(self._select)
        self.selects, untouched = self._try(projection, device)
        if not self.selects:
            selection.remove()
        self.fuses = untouched and type(projection) is nn.Linear and "forward" not in vars(projection)
        if self.fuses:
            projection.forward = MethodType(self._forward_of(type(projection)), projection)

    def __call__(
        self, targets: "torch.Tensor | None", target_ids: "torch.Tensor", scale: float, **arguments: Any
    ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Any]":
        """Runs model(**arguments). Returns what `linear_cross_entropy` does, and the model's output, in which the
        logits of tokens are no such thing.

        targets: int64 [targets], their places in the flattened batch; None: all. target_ids: int64 [targets].
        """
        import torch
        from torch.nn import functional

        selects = self.selects and targets is not None
        fuses = self.fuses and (selects or targets is None)
        try:
            self._targets = targets if selects else None
            self._target_ids, self._scale = target_ids if fuses else None, scale
            output = self.model(**arguments)
            of_tokens, correct = self._of_tokens, self._correct
        finally:
            self._targets = self._target_ids = self._of_tokens = self._correct = None
        if fuses:
            # Not the output itself: where that is the loss, DeepSpeed divides its gradient by the accumulation steps
            # whatever `scale_wrt_gas` says (0.19.8, engine._backward_prologue_per_tensor).
            return output[0].clone(), of_tokens, correct, output
        logits = output[0].flatten(0, 1)
        if targets is not None and not selects:
            logits = logits.index_select(0, targets)
        logits = logits[:, : self.vocabulary].float()
        of_tokens = functional.cross_entropy(logits, target_ids, reduction="none")
        total = of_tokens.sum()
        if self._z_loss or self._label_smoothing:
            total = trained_loss(logits, target_ids, self._z_loss, self._label_smoothing).sum()
        correct = None if torch.is_grad_enabled() else logits.argmax(1) == target_ids
        return total * scale, of_tokens.detach(), correct, output

    def logits(self, targets: "torch.Tensor", **arguments: Any) -> "torch.Tensor":
        """Runs model(**arguments); the logits at `targets`, places in the flattened batch, without those of padding
        [targets, vocabulary]."""
        try:
            self._targets = targets if self.selects else None
            logits = self.model(**arguments)[0].flatten(0, 1)
        finally:
            self._targets = None
        if not self.selects:
            logits = logits.index_select(0, targets)
        return logits[:, : self.vocabulary]

    def _select(self, base_model: Any, arguments: Any, output: Any) -> Any:
        """A forward hook: hidden states [batch, sequence, width] to [1, targets, width]."""
        if self._targets is None or getattr(output, "last_hidden_state", None) is None:
            return None
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1).index_select(0, self._targets)[None]
        return output

    def _forward_of(self, linear_class: Any) -> "Callable[..., torch.Tensor]":
        def forward(projection: Any, hidden: "torch.Tensor") -> "torch.Tensor":
            if self._target_ids is None:
                return linear_class.forward(projection, hidden)
            total, self._of_tokens, self._correct = linear_cross_entropy(
                hidden.flatten(0, -2),
                projection.weight,
                projection.bias,
                self._target_ids,
                scale=self._scale,
                z_loss=self._z_loss,
                label_smoothing=self._label_smoothing,
                vocabulary=self.vocabulary,
            )
            return total

        return forward

    def _try(self, projection: Any, device: "torch.device") -> tuple[bool, bool]:
        """Whether the logits of some positions are the same when only their hidden states reach the head, and whether
        the output of `projection` leaves the model as it is."""
        import torch

        config = getattr(self.model, "module", self.model).config
        vocabulary = self.vocabulary or config.get_text_config().vocab_size
        tokens = torch.arange(16, device=device).view(2, 8) % vocabulary
        places = torch.tensor([1, 6, 11], device=device)
        projected: list[tuple[torch.Tensor, int]] = []
        hook = None
        if isinstance(projection, torch.nn.Module):
            hook = projection.register_forward_hook(lambda *call: projected.append((call[-1], call[-1]._version)))
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                logits = self.model(input_ids=tokens)[0]
                untouched = len(projected) == 1 and _is_same(logits, *projected[0])
                self._targets = places
                selected = self.model(input_ids=tokens)[0]
        finally:
            self._targets = None
            self.model.train(training)
            if hook is not None:
                hook.remove()
        expected = logits.flatten(0, 1)[places].float()
        if selected.shape != (1, *expected.shape):
            return False, untouched
        change, distance = (selected[0] - expected).abs().max(), (expected - expected.roll(1, 0)).abs().max()
        return bool(change <= 0.1 * distance), untouched


def _is_same(tensor: "torch.Tensor", earlier: "torch.Tensor", version: int) -> bool:
    """Whether a tensor is an earlier one that nobody wrote to since. DeepSpeed's hooks wrap it without copying."""
    return (
        tensor.data_ptr() == earlier.data_ptr()
        and tensor.shape == earlier.shape
        and tensor.dtype == earlier.dtype
        and tensor._version == version
    )
