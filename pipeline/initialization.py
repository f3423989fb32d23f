"""Initial weights by the papers, where transformers' are others.

transformers (5.23) already draws GPT-2's as the paper has them (Radford et al. 2019, section 2.3: the residual
projections' deviation divided by sqrt(2 x layers), the others' 0.02) and ModernBERT's (Warner et al. 2024, appendix:
truncated, residual projections likewise). Llama's paper (Touvron et al. 2023) states none: transformers' normal
distribution stays, as for every other architecture.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRUNCATED = ("bert", "albert", "electra")
_CUT = 2  # standard deviations, as TensorFlow's truncated_normal_initializer has it


def initialize(model: "PreTrainedModel") -> None:
    """Draws the weights of models that Google released anew, from torch's generator; leaves others as they are.

    Every matrix and embedding, those of padding and pooler included, from a normal distribution of deviation
    `initializer_range` that is drawn again beyond two deviations (google-research/bert, modeling.py,
    create_initializer; ALBERT's and ELECTRA's have the same): its deviation is 0.8796 of that. Biases are 0 and norms 1
    already.
    """
    from torch import nn

    if model.config.model_type not in _TRUNCATED:
        return
    deviation = model.config.initializer_range
    matrices = (module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding))
    for matrix in {id(matrix): matrix for matrix in matrices}.values():
        nn.init.trunc_normal_(matrix, std=deviation, a=-_CUT * deviation, b=_CUT * deviation)
