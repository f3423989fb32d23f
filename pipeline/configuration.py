"""From the command line to a checked recipe and ds_config, before torch does any work."""

from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline import ops
from pipeline.ds_config import check_carried_out, merge_into_recipe
from pipeline.ds_config_keys import check_ds_config_keys, read_ds_config
from pipeline.recipe import Recipe, check_recipe, override, read_recipe_file


def resolve(
    recipe_path: Path, overrides: tuple[tuple[str, str], ...], ds_config_path: Path
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and the ds_config without what belongs to the recipe.

    overrides: (dotted field, text) of the command line. Raises UserError naming file, key and what was expected for
    the first thing that is wrong in either file, or in what they say together.
    """
    raw = read_recipe_file(recipe_path)
    lengths = {"training.max_steps", "training.max_tokens"}
    if lengths <= {name for name, _ in overrides}:
        raise UserError("--training.max_steps and --training.max_tokens are two ways to say one thing; give one")
    for name, text in overrides:
        override(raw, name, text)
    ds_config = read_ds_config(ds_config_path)
    ops.configure_environment()  # before the check imports deepspeed
    check_ds_config_keys(ds_config, str(ds_config_path))
    check_carried_out(ds_config, str(ds_config_path))
    raw, ds_config = merge_into_recipe(
        raw, ds_config, recipe_source=str(recipe_path), config_source=str(ds_config_path)
    )
    return check_recipe(raw, str(recipe_path)), ds_config
