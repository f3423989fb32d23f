"""One number for all that a rank's next step depends on, or for what must be the same on all ranks."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def digest(tensors: "Iterable[torch.Tensor]") -> str:
    """sha256, as hexadecimal, of the tensors' bytes in their order."""
    import torch

    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        found.update(flat.cpu().numpy().data)
    return found.hexdigest()


def weights(engine: Any) -> "Iterable[torch.Tensor]":
    """The weights that this rank computes with, of DeepSpeed's engine: all of them, at ZeRO stage 3 its share."""
    for parameter in engine.module.parameters():
        yield getattr(parameter, "ds_tensor", parameter)


def state(engine: Any) -> "Iterable[torch.Tensor]":
    """The weights, and what the optimizer keeps on this rank: weights in float32 and moments."""
    import torch

    yield from weights(engine)
    for group in engine.basic_optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            kept = engine.basic_optimizer.state.get(parameter, {})
            yield from (kept[name] for name in sorted(kept) if isinstance(kept[name], torch.Tensor))


def of_checkpoint(folder: Path) -> dict[str, str]:
    """Digests of what a committed checkpoint holds, by what it is: "weights" and "optimizer".

    Raises UserError where a file of it is not as it was written; nothing is unpickled before that is known.
    """
    import torch

    from pipeline import checkpoint

    checkpoint.verify(folder, checkpoint.read_info(folder))
    found = {"weights": hashlib.sha256(), "optimizer": hashlib.sha256()}
    for path in sorted(folder.rglob("*.pt")):
        held = torch.load(path, map_location="cpu", weights_only=False)
        if "optimizer_state_dict" in held:
            _feed(found["optimizer"], held["optimizer_state_dict"])
        if held.get("optimizer"):
            _feed(found["optimizer"], held["optimizer"])
        if held.get("module"):
            _feed(found["weights"], held["module"])
    return {what: one.hexdigest() for what, one in found.items()}


def _feed(found: Any, value: Any) -> None:
    """Adds tensors and plain values, in the order in which they are kept, and the keys that lead to them."""
    import torch

    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)}".encode() + bytes.fromhex(digest([value])))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            found.update(f"{key!r}:".encode())
            _feed(found, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _feed(found, inner)
    elif value is None or isinstance(value, bool | int | float | str):
        found.update(repr(value).encode())
