"""Before a run: are all hosts alike (at every start), and with `--dry_run` what else can be known in half a minute."""

import hashlib
import json
import os
import platform
import re
import shutil
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import read_manifest
from data_prep.shards import is_foreign
from pipeline.batch import BatchPlan
from pipeline.data import Data
from pipeline.engine import Engine
from pipeline.loader import to_device
from pipeline.order import Places
from pipeline.provenance import git_commit, package_versions
from pipeline.recipe import Recipe
from pipeline.samples import Batch
from pipeline.startup import RankError, World

_REDUCED_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
_MATRIX = {"cpu": 512, "cuda": 4096}
_REPEATS = 5
# Settings that may name what is another device on another host, or where it writes.
_OF_ONE_HOST = re.compile("IFNAME|HCA|ADDR|DEBUG|FILE|TOPO|HOSTID")
_SEEN_SECONDS = 5.0
_SLOW = 1.25  # times the median: a rank that takes longer for the same work is named


def describe_host(
    recipe: Recipe, ds_config: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What has to be the same on every host, by what to call it."""
    nccl = sorted(name for name in environment if name.startswith("NCCL_") and not _OF_ONE_HOST.search(name))
    configuration = json.dumps([recipe.model_dump(mode="json"), ds_config], sort_keys=True).encode()
    return {
        "commit": str(git_commit()),
        "recipe and ds_config": hashlib.sha256(configuration).hexdigest()[:12],
        "python": platform.python_version(),
        "NCCL settings": ", ".join(f"{name}={environment[name]}" for name in nccl),
        **package_versions(),
    }


def difference(hosts: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
    """The first thing in which a host differs from the first one: (name, what it has) of each."""
    (first, expected), *others = hosts
    for name, found in others:
        for what, value in expected.items():
            if found.get(what) != value:
                return f"{name} has {what} {found.get(what) or 'none'}, {first} has {value or 'none'}"
    return None


def _of_hosts(world: World, mine: Any) -> list[tuple[str, Any]]:
    """(name, what its first rank gave) of every host, in the order of their ranks."""
    gathered = world.gather((socket.gethostname(), mine) if world.local_rank == 0 else None)
    return [host for host in gathered if host is not None]


def check_hosts_alike(world: World, described: Mapping[str, str]) -> int:
    """The number of hosts; raises UserError on every rank, naming the host, when one of them differs."""
    hosts = _of_hosts(world, described)
    if (found := difference(hosts)) is not None:
        raise UserError(f"{found}: bring the hosts to one commit, environment, configuration and copy of the data")
    return len(hosts)


def describe_copies(data: Data) -> dict[str, str]:
    """What each host has read of its own copies, where they are not on shared storage."""
    shards = {f"data.shards {corpus.name} of fingerprint": corpus.shards.fingerprint[:12] for corpus in data.corpora}
    return {"data.tokenizer of fingerprint": data.tokenizer.fingerprint[:12], **shards}


def check_output_shared(world: World, output_dir: Path) -> None:
    """Raises UserError on every rank, naming the host, when one does not see what rank 0 writes to the run's folder.

    Each rank writes its part of a checkpoint, and rank 0 commits what is there.
    """
    path = output_dir / world.from_first(f".seen-by-all-{uuid.uuid4().hex}")
    if world.is_first:
        path.touch()
    world.barrier()
    hosts = _of_hosts(world, world.local_rank > 0 or _appears(path))
    if world.is_first:
        path.unlink()
    blind = [host for host, sees in hosts if not sees]
    if blind:
        raise UserError(
            f"{', '.join(blind)} does not see what {hosts[0][0]} writes to --output_dir {output_dir}: put it on storage"
            " that all hosts share"
        )


def _appears(path: Path) -> bool:
    """Whether a file that another host has made is there, be it after a while (NFS keeps what it knows of folders)."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def dry_run(
    world: World, engine: Engine, recipe: Recipe, data: Data, batches: BatchPlan, output_dir: Path, parameters: int
) -> list[str]:
    """Lines about data, disk, communication, speed and memory; one step of random tokens is taken, at learning rate 0.

    parameters: of the model. Raises RankError for shards that are not whole and for a disk without room for the run's
    checkpoints, as this host sees them.
    """
    lines = []
    if world.local_rank == 0:  # once a host
        lines.append(f"shards    {check_shards(data)} files are there, of the sizes that their manifests say")
        lines.append(f"disk      {check_disk(recipe, output_dir, parameters)}")
    lines += _communication(world)
    step, rest = _random_step(world, engine, recipe, batches)
    memory = max(_gathered(world, float(world.memory_bytes())))
    lines.append(
        f"step      {rest:.2f} s a micro-batch of {batches.micro_batch_size} x {recipe.data.sequence_length} random"
        f" tokens with its update (the first {step:.2f} s), at most {memory / 1e9:.2f} GB a rank"
    )
    return lines


def check_shards(data: Data) -> int:
    checked = 0
    for folder in (corpus.shards.folder for corpus in data.corpora):
        for name, record in ({} if is_foreign(folder) else read_manifest(folder).files).items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else -1
            if size != record.bytes:
                found = "is missing" if size < 0 else f"has {size:,} bytes, expected {record.bytes:,}"
                raise RankError(f"{path} {found}; run `python -m data_prep verify {folder}`")
            checked += 1
    return checked


def check_disk(recipe: Recipe, output_dir: Path, parameters: int) -> str:
    """Weights in two or four bytes and Adam's three float32 values for each, or four with an average of the weights, as
    often as checkpoints stand there."""
    averages = recipe.optimizer.ema_decay is not None
    needed = parameters * (4 + 12 + 4 * averages) * (recipe.checkpoint.keep_last + 1)
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise RankError(
            f"--output_dir {output_dir} has {free / 1e9:.1f} GB free, but {recipe.checkpoint.keep_last} checkpoints and"
            f" one that is being written take up to {needed / 1e9:.1f} GB; make room or lower checkpoint.keep_last"
        )
    return f"{free / 1e9:,.0f} GB free, checkpoints take up to {needed / 1e9:,.1f} GB"


def _gathered(world: World, value: float) -> list[float]:
    import torch
    from torch import distributed

    values = [torch.zeros(1, dtype=torch.float64, device=world.device) for _ in range(world.size)]
    distributed.all_gather(values, torch.tensor([value], dtype=torch.float64, device=world.device))
    return [float(one) for one in values]


def _communication(world: World) -> list[str]:
    """All-reduce bandwidth, and ranks that take long for a matrix product that all do alike."""
    import torch
    from torch import distributed

    size = _REDUCED_BYTES.get(world.device.type, _REDUCED_BYTES["cuda"])
    buffer = torch.zeros(size // 4, device=world.device)
    side = _MATRIX.get(world.device.type, _MATRIX["cuda"])
    matrix = torch.ones(side, side, device=world.device)

    def timed(action: Any) -> float:
        seconds = []
        for _ in range(_REPEATS):
            world.barrier()
            started = time.perf_counter()
            action()
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    reduced = max(_gathered(world, timed(lambda: distributed.all_reduce(buffer))))
    # Each rank sends and receives 2 (n - 1) / n of the buffer in a ring (NCCL's "bus bandwidth").
    bus = size * 2 * (world.size - 1) / world.size / reduced / 1e9
    products = _gathered(world, timed(lambda: matrix @ matrix))
    median = float(np.median(products))
    slow = [f"rank {rank} {seconds / median:.2f}x" for rank, seconds in enumerate(products) if seconds > _SLOW * median]
    speed = (
        f"slow: {', '.join(slow)} the median"
        if slow
        else f"all ranks within {max(products) / median:.2f}x of the median"
    )
    return [
        f"network   all-reduce of {size >> 20} MiB in {reduced * 1e3:.1f} ms, {bus:.2f} GB/s a rank",
        f"ranks     a matrix product in {median * 1e3:.2f} ms; {speed}",
    ]


def _random_step(world: World, engine: Engine, recipe: Recipe, batches: BatchPlan) -> tuple[float, float]:
    """Seconds of the first and the second step of one micro-batch a rank."""
    rows, sequence = batches.micro_batch_size, recipe.data.sequence_length
    vocabulary = engine.head.vocabulary or engine.deepspeed.module.config.get_text_config().vocab_size
    ids = np.random.default_rng(world.rank).integers(0, vocabulary, (rows, sequence)).astype(np.int32)
    zeros = np.zeros(rows, dtype=np.int64)
    targets = np.arange(0, rows * sequence, 7 if recipe.objective == "mlm" else 1)
    pairs = zeros if recipe.pack_settings.is_pairs else None
    batch = Batch(ids, ids.reshape(-1)[targets], targets, None, sequence, Places(zeros, zeros, zeros), None, pairs)
    seconds = []
    for step in range(2):
        started = time.perf_counter()
        engine.train_step(step, [to_device(batch, world.device)], 0.0)
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]
