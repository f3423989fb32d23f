"""What a checkpoint is: its folder, its manifest, and which one a run goes on from. Nothing here unpickles anything.

`checkpoints/step-00001000/` holds DeepSpeed's files, each rank's generator states and `checkpoint.json`, which has the
size and sha256 of every file. A folder gets that name when all of it is on disk (pipeline.checkpointer), and never
again: the newest one that verifies is the newest checkpoint. `last_checkpoint.json`, beside `checkpoints/`, says which
was committed last, so that a run whose folders are gone is not taken for a new one.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError
from data_prep.manifest import FileRecord
from pipeline.startup import World

CHECKPOINTS = "checkpoints"
MANIFEST_NAME = "checkpoint.json"
POINTER_NAME = "last_checkpoint.json"
FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Sources:
    """What a run is made from: the sha256 of its recipe, the tokenizer's and each corpus's fingerprint."""

    recipe: str
    tokenizer: str
    corpora: dict[str, str]


@dataclass(frozen=True)
class CheckpointInfo:
    """What `checkpoint.json` says.

    step: optimizer steps done; samples: consumed by them. learning_rate: of the last one. digests: of each rank's
    tensors, weights and optimizer states (pipeline.checkpointer.digest). files: by their path in the folder.
    """

    step: int
    samples: int
    learning_rate: float
    world_size: int
    zero_stage: int
    precision: str
    sources: Sources
    digests: tuple[str, ...]
    files: dict[str, FileRecord]

    @property
    def layout(self) -> str:
        """Who wrote it, in words."""
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        return f"{ranks} at ZeRO stage {self.zero_stage} in {self.precision}"

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    folder = output_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def to_prune(present: Iterable[Path], keep_last: int, keep_every: int | None) -> list[Path]:
    """The checkpoints that may go: all but the last `keep_last` and those of every `keep_every`-th step."""
    older = sorted(present, key=step_of)[:-keep_last]
    return [folder for folder in older if keep_every is None or step_of(folder) % keep_every]


def manifest_bytes(info: CheckpointInfo) -> bytes:
    """The content of `checkpoint.json`, which ends with the sha256 of its own values."""
    value = {"format_version": FORMAT_VERSION, **asdict(info), "digests": list(info.digests)}
    return durable.json_bytes({**value, "sha256": hashlib.sha256(durable.json_bytes(value)).hexdigest()})


def read_info(folder: Path) -> CheckpointInfo:
    """Raises UserError when the folder is no checkpoint of ours, or its manifest is not what was written."""
    path = folder / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {folder} is no checkpoint") from None
    try:
        raw = json.loads(content)
        if raw.pop("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path} is of another format than {FORMAT_VERSION}: resume it with the version that wrote it"
            )
        raw.pop("sha256")
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        sources, digests = Sources(**raw.pop("sources")), tuple(raw.pop("digests"))
        info = CheckpointInfo(**raw, sources=sources, digests=digests, files=files)
        if manifest_bytes(info) != content:
            raise UserError(f"{path} is damaged (it is not as it was written)")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r})") from None
    if folder_name(info.step) != folder.name:
        raise UserError(f"{path} is of step {info.step}, not of {folder.name}")
    return info


def fault_of(folder: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with one file of a checkpoint."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path} is damaged ({size:,} bytes, expected {record.bytes:,})"
        if durable.sha256_of(path) != record.sha256:
            return f"{path} is damaged (its sha256 is not {MANIFEST_NAME}'s)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None


def stray_fault(folder: Path, info: CheckpointInfo) -> str | None:
    """A file of states that nobody wrote: DeepSpeed reads what has a name that it expects."""
    stray = sorted(path.name for path in folder.glob("*.pt") if path.name not in info.files)
    return f"{folder / stray[0]} is not of this checkpoint" if stray else None


def verify(folder: Path, info: CheckpointInfo) -> None:
    """Raises UserError naming the first file that is not as it was written (nothing is unpickled before this)."""
    faults = [fault_of(folder, name, record) for name, record in info.files.items()]
    for fault in (*faults, stray_fault(folder, info)):
        if fault is not None:
            raise UserError(f"{fault}; remove {folder} to go on from the checkpoint before it")


def verify_together(folder: Path, world: World) -> CheckpointInfo:
    """As `read_info` and `verify`, by all ranks, each of which digests its share of the bytes.

    Raises the same UserError on every rank; the manifest has to be the same one everywhere.
    """
    fault, info, manifest = None, None, ""
    try:
        info = read_info(folder)
        manifest = hashlib.sha256(manifest_bytes(info)).hexdigest()
        shares = [0] * world.size
        for name, record in sorted(info.files.items(), key=lambda item: (-item[1].bytes, item[0])):
            rank = shares.index(min(shares))
            shares[rank] += record.bytes + 1
            if rank == world.rank and fault is None:
                fault = fault_of(folder, name, record)
        if fault is None:
            fault = stray_fault(folder, info)
    except UserError as error:
        fault = str(error)
    found: list[tuple[str | None, str]] = world.gather((fault, manifest))
    for rank, (theirs, their_manifest) in enumerate(found):
        if theirs is not None:
            raise UserError(theirs)
        if their_manifest != found[0][1]:
            raise UserError(
                f"{folder / MANIFEST_NAME} is another one on rank {rank} than on rank 0: ranks have to share it"
            )
    assert info is not None
    return info


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from. skipped: newer ones, each as the fault that was found in it."""

    folder: Path
    info: CheckpointInfo
    skipped: tuple[str, ...] = ()


def find(resume: str, output_dir: Path, world: World) -> Found | None:
    """The verified checkpoint that `--resume` means, the same on all ranks, or None for a start from scratch.

    "auto" takes the newest one that is whole. Raises UserError, on every rank, where there were checkpoints and none is
    whole, where "none" or a PATH would mix two runs in one folder, or where a named checkpoint is missing or damaged.
    """
    present: list[Path] = world.gather(list_checkpoints(output_dir) if world.is_first else None)[0]
    if resume == "auto":
        return _newest(output_dir, present, world)
    own = f"{output_dir} holds {present[-1].name}; " if present else ""
    if resume == "none":
        if present:
            raise UserError(f"--resume none, but {own}give another --output_dir, or remove the folder to lose that run")
        return None
    folder = Path(resume)
    if not _NAME.fullmatch(folder.name) or not folder.is_dir():
        raise UserError(
            f"--resume {resume}: expected auto, none or a folder such as {output_dir}/{CHECKPOINTS}/step-00001000"
        )
    if present and folder.resolve().parent != (output_dir / CHECKPOINTS).resolve():
        raise UserError(
            f"--resume {resume}, but {own}give another --output_dir, or --resume auto to go on with that run"
        )
    return Found(folder, verify_together(folder, world))


def _newest(output_dir: Path, present: list[Path], world: World) -> Found | None:
    skipped: list[str] = [
        fault for fault in world.gather(_lost(output_dir, present) if world.is_first else None) if fault is not None
    ]
    for folder in reversed(present):
        try:
            return Found(folder, verify_together(folder, world), tuple(skipped))
        except UserError as error:
            skipped.append(str(error))
    if not skipped:
        return None
    raise UserError(
        f"no whole checkpoint is left in {output_dir / CHECKPOINTS}: {'; '.join(skipped)}; restore one, or start anew"
        " in another --output_dir"
    )


def check_position(info: CheckpointInfo, samples: int, learning_rate: float, sources: Sources) -> None:
    """Raises UserError when the step of a checkpoint is at another sample, or had another learning rate, than now.

    samples, learning_rate: that belong to the checkpoint's step by the recipe as it is now. The rate is compared where
    the recipe is the very same: a longer run has other ones.
    """
    if samples != info.samples:
        raise UserError(f"the checkpoint of step {info.step} has {info.samples:,} samples, the recipe {samples:,}")
    if sources.recipe == info.sources.recipe and learning_rate != info.learning_rate:
        raise UserError(
            f"step {info.step} had the learning rate {info.learning_rate!r}, the recipe gives {learning_rate!r} now: go"
            " on with the version that wrote the checkpoint"
        )


def write_pointer(output_dir: Path, step: int) -> None:
    durable.write_json(output_dir / POINTER_NAME, {"name": folder_name(step), "step": step})


def _lost(output_dir: Path, present: list[Path]) -> str | None:
    """What `last_checkpoint.json` says was committed after all that is there."""
    path = output_dir / POINTER_NAME
    try:
        raw: Any = json.loads(path.read_bytes())
        name, step = str(raw["name"]), int(raw["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged ({error!r})"
    if present and step_of(present[-1]) >= step:
        return None
    return f"{output_dir / CHECKPOINTS / name}, the last that was saved, is gone"
