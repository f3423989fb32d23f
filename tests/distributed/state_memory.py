"""Run by the launcher: takes steps with several ds_configs and writes what a rank's tensors came to.

`state_memory.py OUTPUT CONFIG...`: OUTPUT gets {config: {parameters, held, peak}} in bytes; held before the last
step, peak over the last accumulated batch and its step.
"""

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

from pipeline import ops  # noqa: E402
from pipeline.optimizer import make_optimizer  # noqa: E402
from pipeline.recipe import OptimizerSection  # noqa: E402
from pipeline.startup import init_distributed, leave, set_environment  # noqa: E402

STEPS = 2  # the optimizer's states come with the first
ACCUMULATION = 2
# 48.9 M parameters: large enough that nothing but states and their copies counts beside eight tokens.
MODEL = {"n_layer": 6, "n_embd": 768, "n_head": 12, "n_positions": 64, "vocab_size": 8192, "use_cache": False}
NO_DROPOUT = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def measured(ds_config: dict[str, Any], world_size: int) -> dict[str, int]:
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    ds_config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "train_batch_size": ACCUMULATION * world_size,
        "gradient_clipping": 1.0,
        "steps_per_print": 1 << 62,
    }
    model_config = AutoConfig.for_model("gpt2", **MODEL, **NO_DROPOUT)
    live = LiveBytes()
    with live:
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, attn_implementation="sdpa")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = make_optimizer(model, OptimizerSection(lr=1e-3), ds_config)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
        del model, optimizer
        gc.collect()
        ids = torch.zeros(1, 8, dtype=torch.long)
        for _ in range(STEPS):
            live.peak = live.now
            for index in range(ACCUMULATION):
                loss = engine(input_ids=ids).logits.float().mean()
                engine.set_gradient_accumulation_boundary(index == ACCUMULATION - 1)
                engine.backward(loss)
                del loss
                held = live.now
                engine.step()
        result = {"parameters": parameters, "held": held, "peak": live.peak}
    engine.destroy()
    del engine
    gc.collect()
    return result


def main() -> None:
    output, *paths = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--")]
    set_environment()
    world = init_distributed()
    configs = {path.stem: json.loads(path.read_text()) for path in paths}
    needed = {name for config in configs.values() for name in ops.required_ops(config, "cpu")}
    ops.build_ops(sorted(needed), print)
    found = {name: measured(config, world.size) for name, config in configs.items()}
    if world.is_first:
        output.write_text(json.dumps(found))
    world.close()
    leave(0)


if __name__ == "__main__":
    main()
