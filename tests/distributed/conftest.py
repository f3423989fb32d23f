"""Recipes for tests that start real ranks."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.ranks import DROPOUT, MODELS


@pytest.fixture(scope="session")
def write_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_tokenizer: Path) -> Any:
    """write_recipe(objective, model={...}, **sections) -> the path of a recipe on the tiny shards."""

    def write(objective: str, *, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Path:
        recipe = {
            "objective": objective,
            "model": {"config": {**MODELS[objective], **(DROPOUT[objective] if model is None else model)}},
            "data": {
                "shards": str(tiny_shards),
                "tokenizer": str(tiny_tokenizer),
                "sequence_length": 32,
                "validation_fraction": 0.1,
            },
            "training": {"global_batch_size": 8, "max_steps": 4},
            "optimizer": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"type": "cosine", "warmup_steps": 2, "min_lr": 1e-3},
            "evaluation": {"every_steps": 0, "samples": 8},
            "checkpoint": {"every_steps": 2, "keep_last": 5},
        }
        for name, section in sections.items():
            recipe[name] = {**recipe.get(name, {}), **section}  # type: ignore[dict-item]
        path = tmp_path_factory.mktemp("recipe") / f"{objective}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write
