"""The optimizer of a run: which rule updates which weights, and which of them decay."""

from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from pipeline.ds_config import offload_device, zero_stage
from pipeline.recipe import OptimizerSection

if TYPE_CHECKING:
    import torch


def parameter_groups(model: "torch.nn.Module", weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings decay; biases and norms (one dimension) do not, as GPT-2's and BERT's trainings do."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: "torch.nn.Module") -> list["torch.nn.Parameter"]:
    """The matrices of the layers between embeddings and heads: those of the modules that the model stacks."""
    from torch import nn

    stacked = [
        parameter
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for module in stack.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 2 and parameter.requires_grad
    ]
    return list({id(parameter): parameter for parameter in stacked}.values())


def optimizer_groups(model: "torch.nn.Module", recipe: OptimizerSection) -> list[dict[str, Any]]:
    """The recipe's groups of the model's parameters, in the optimizer's order, with what its rule asks for each.

    Raises UserError where the model has nothing for Muon.
    """
    groups = parameter_groups(model, recipe.weight_decay)
    if recipe.type == "Lamb":
        return [{**group, "adapts": group["params"][0].ndim >= 2} for group in groups]
    if recipe.type != "Muon":
        return groups
    matrices = hidden_matrices(model)
    if not matrices:
        raise UserError(
            "optimizer.type is Muon, but the model stacks no layers (torch.nn.ModuleList) with matrices to"
            " orthogonalise; take AdamW"
        )
    taken = {id(matrix) for matrix in matrices}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    groups.insert(0, {"params": matrices, "weight_decay": recipe.weight_decay})
    return [{**group, "orthogonal": index == 0} for index, group in enumerate(groups) if group["params"]]


def make_optimizer(
    model: "torch.nn.Module", recipe: OptimizerSection, ds_config: dict[str, Any]
) -> "torch.optim.Optimizer":
    """The recipe's optimizer over the model's weights, which are still whole; `check_optimizer` let the two pass.

    AdamW is torch's fused kernel, which needs no C++ op to be built, or DeepSpeed's where the states are offloaded.
    Learning rates are 0 until a step sets one: DeepSpeed takes a step with zero gradients in its initialisation.
    Raises UserError where the model has nothing for Muon.
    """
    import torch

    groups = optimizer_groups(model, recipe)
    if recipe.type == "AdamW":
        common: dict[str, Any] = {"lr": 0.0, "betas": recipe.betas, "eps": recipe.eps}
        if offload_device(ds_config, "optimizer") != "none":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
        return torch.optim.AdamW(groups, fused=True, **common)

    from pipeline.update_rules import Kept, Lamb, Lion, Muon

    if recipe.type == "Lion":
        return Lion(groups, 0.0, recipe.betas)
    if recipe.type == "Lamb":
        return Lamb(groups, 0.0, recipe.betas, recipe.eps)
    stages: tuple[Kept, ...] = ("whole", "joined", "joined", "each")
    return Muon(groups, 0.0, recipe.betas, recipe.eps, recipe.momentum, stages[zero_stage(ds_config)])
