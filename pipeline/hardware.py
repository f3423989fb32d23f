"""GPUs by their makers' data sheets: what they hold, what they compute, what they send."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One card. Rates are peaks of the data sheet, dense (without structured sparsity), for one direction.

    memory: bytes. bf16_flops, fp8_flops, fp32_flops: FLOP/s of matrix products, fp32 without TF32 (fp8 None where the
    card has none). memory_bandwidth: bytes/s. intra_node_bandwidth: bytes/s between two cards of a node, to each.
    inter_node_bandwidth: bytes/s a card to other nodes: one network card a GPU, as the named server has it. source:
    where the numbers stand.
    """

    memory: float
    bf16_flops: float
    fp8_flops: float | None
    fp32_flops: float
    memory_bandwidth: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    source: str

    def flops(self, precision: str) -> float:
        """The peak of matrix products in "bf16", "fp16" (the same) or "fp32"."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops


# By words of the name that CUDA gives the card; the first that fits, so "H100 PCIe" stands before "H100".
GPUS = {
    "B200": Gpu(
        180e9, 2250e12, 4500e12, 75e12, 7.7e12, 900e9, 50e9,
        "NVIDIA HGX B200 data sheet (an eighth of the board's), NVLink 5, 400 Gb/s a GPU as in DGX B200",
    ),
    "H200": Gpu(
        141e9, 989e12, 1979e12, 67e12, 4.8e12, 450e9, 50e9,
        "NVIDIA H200 data sheet (SXM), NVLink 4, 400 Gb/s a GPU as in DGX H200",
    ),
    "H100 PCIe": Gpu(
        80e9, 756e12, 1513e12, 51e12, 2.0e12, 64e9, 25e9,
        "NVIDIA H100 data sheet (PCIe), PCIe 5.0 x16, 200 Gb/s a GPU assumed",
    ),
    "H100": Gpu(
        80e9, 989e12, 1979e12, 67e12, 3.35e12, 450e9, 50e9,
        "NVIDIA H100 data sheet (SXM), NVLink 4, 400 Gb/s a GPU as in DGX H100",
    ),
    "A100-SXM4-40GB": Gpu(
        40e9, 312e12, None, 19.5e12, 1.555e12, 300e9, 25e9,
        "NVIDIA A100 data sheet (SXM, 40 GB), NVLink 3, 200 Gb/s a GPU as in DGX A100",
    ),
    "A100": Gpu(
        80e9, 312e12, None, 19.5e12, 2.039e12, 300e9, 25e9,
        "NVIDIA A100 data sheet (SXM, 80 GB), NVLink 3, 200 Gb/s a GPU as in DGX A100",
    ),
    "L40S": Gpu(
        48e9, 362e12, 733e12, 91.6e12, 864e9, 32e9, 25e9,
        "NVIDIA L40S data sheet, PCIe 4.0 x16, 200 Gb/s a GPU assumed",
    ),
    "L4": Gpu(
        24e9, 121e12, 242e12, 30.3e12, 300e9, 32e9, 12.5e9,
        "NVIDIA L4 data sheet (half of its figures with sparsity), PCIe 4.0 x16, 100 Gb/s a GPU assumed",
    ),
    "A10": Gpu(
        24e9, 125e12, None, 31.2e12, 600e9, 32e9, 12.5e9,
        "NVIDIA A10 data sheet, PCIe 4.0 x16, 100 Gb/s a GPU assumed",
    ),
    "RTX 4090": Gpu(
        24e9, 165e12, 330e12, 82.6e12, 1.008e12, 32e9, 12.5e9,
        "NVIDIA Ada architecture whitepaper, appendix A (fp32 accumulation), PCIe 4.0 x16, 100 Gb/s a GPU assumed",
    ),
}  # fmt: skip


def find_gpu(device_name: str) -> Gpu | None:
    """The card of a name that CUDA gives; None where it is not known (and on CPUs)."""
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name}\b", device_name)), None)


def peak_flops(device_name: str) -> float | None:
    """The dense bf16 peak of a GPU by the name that CUDA gives it; None where it is not known (and on CPUs)."""
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.bf16_flops
