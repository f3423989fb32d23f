"""Opens a Hugging Face folder as anybody would, in a process of its own without this project, and compares.

`python -I plain_transformers.py JOB.json` prints one JSON object: for each sample whether the model's outputs are the
expected ones bit for bit, likewise for each weight, and for each text whether the tokenizer's ids are.
`pipeline.export_gate` writes the job:

    folder, auto_class, dtype, threads    what is opened, and how
    digests                               of the weights, by name
    samples                               safetensors files with `input_ids`, other arguments, and `output_0`, ...
    texts, ids                            what the tokenizer is to make of what, without special tokens
"""

import hashlib
import json
import sys
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    """The findings: `weights`, the names of those that differ; `samples`, each an object with `equal`, `share` of the
    numbers that differ, `largest` difference and `shapes`; `texts`, whether each is right; `modules`, this project's
    that were imported."""
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.set_num_threads(job["threads"])
    auto = getattr(transformers, job["auto_class"])
    model = auto.from_pretrained(job["folder"], dtype=getattr(torch, job["dtype"])).eval()
    found = digests(model)
    weights = sorted(name for name in {*found, *job["digests"]} if found.get(name) != job["digests"].get(name))
    findings = []
    for path in job["samples"]:
        tensors = load_file(path)
        expected = [tensors.pop(name) for name in sorted(name for name in tensors if name.startswith("output_"))]
        with torch.no_grad():
            outputs = model(**tensors, return_dict=False)
        findings.append(compared(outputs, expected))
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
    texts = [
        tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        for text, ids in zip(job["texts"], job["ids"], strict=True)
    ]
    ours = sorted(name for name in sys.modules if name.split(".")[0] in ("pipeline", "data_prep"))
    return {"weights": weights, "samples": findings, "texts": texts, "modules": ours}


def digests(model: Any) -> dict[str, str]:
    """The sha256 of each weight's bytes: samples do not reach every row of every one."""
    import torch

    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def compared(outputs: Any, expected: list[Any]) -> dict[str, Any]:
    """How a model's first outputs compare with the expected ones, all numbers together."""
    shapes = [(list(found.shape), list(wanted.shape)) for found, wanted in zip(outputs, expected, strict=False)]
    if any(found != wanted for found, wanted in shapes):
        return {"equal": False, "share": 1.0, "largest": None, "shapes": shapes}
    differ = sum(int((found != wanted).sum()) for found, wanted in zip(outputs, expected, strict=False))
    numbers = sum(wanted.numel() for wanted in expected)
    largest = max(
        float((found.float() - wanted.float()).abs().max()) for found, wanted in zip(outputs, expected, strict=False)
    )
    return {"equal": differ == 0, "share": differ / numbers, "largest": largest, "shapes": shapes}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(json.dumps(main(json.load(file))))
