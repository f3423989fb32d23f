"""Checkpoints that are whole or not there: written aside, digested, fsynced, renamed; verified before loading.

`checkpoints/step-00001000/` holds DeepSpeed's files and our `checkpoint.json` with every file's size and sha256. There
is no pointer to go stale: the newest folder with a final name is the newest checkpoint.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError
from data_prep.manifest import FileRecord
from pipeline.startup import World

CHECKPOINTS = "checkpoints"
MANIFEST_NAME = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class CheckpointInfo:
    """What `checkpoint.json` says. step: optimizer steps done; samples: consumed by them."""

    step: int
    samples: int
    world_size: int
    zero_stage: int
    precision: str
    files: dict[str, FileRecord]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    folder = output_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def find(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that `--resume` means, or None for a start from scratch.

    Raises UserError where "none" would mix two runs in one folder, or a named checkpoint is not there.
    """
    present = list_checkpoints(output_dir)
    if resume == "auto":
        return present[-1] if present else None
    if resume == "none":
        if present:
            raise UserError(
                f"--resume none, but {output_dir} holds {present[-1].name}; give another --output_dir, or remove the"
                " folder to lose that run"
            )
        return None
    folder = Path(resume)
    if not _NAME.fullmatch(folder.name) or not folder.is_dir():
        raise UserError(
            f"--resume {resume}: expected auto, none or a folder such as {output_dir}/checkpoints/step-00001000"
        )
    return folder


def read_info(folder: Path) -> CheckpointInfo:
    """Raises UserError when the folder is no checkpoint of ours."""
    path = folder / MANIFEST_NAME
    try:
        raw = json.loads(path.read_bytes())
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        return CheckpointInfo(**raw, files=files)
    except FileNotFoundError:
        raise UserError(f"{folder} is no checkpoint: it has no {MANIFEST_NAME}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); resume from an older checkpoint") from None


def verify(folder: Path, info: CheckpointInfo) -> None:
    """Raises UserError naming the first file that is not as it was written (nothing is unpickled before this)."""
    for name, record in info.files.items():
        path = folder / name
        if not path.is_file() or FileRecord.of(path) != record:
            raise UserError(
                f"{path} is missing or damaged (its size or sha256 is not {MANIFEST_NAME}'s); remove {folder} to go on"
                " from the checkpoint before it"
            )


def save(
    engine: Any,
    output_dir: Path,
    world: World,
    *,
    step: int,
    samples: int,
    zero_stage: int,
    precision: str,
    keep: int,
) -> Path:
    """Writes the state of DeepSpeed's engine after `step` steps and prunes to the last `keep`; called on every rank."""
    parent = output_dir / CHECKPOINTS
    final = parent / f"step-{step:08d}"
    temporary = final.with_name(final.name + durable.TEMPORARY_SUFFIX)
    with world.first_alone() as first:
        if first:
            for leftover in parent.glob(f"*{durable.TEMPORARY_SUFFIX}"):
                shutil.rmtree(leftover)
    engine.save_checkpoint(str(parent), tag=temporary.name, save_latest=False, exclude_frozen_parameters=False)
    world.barrier()
    with world.first_alone() as first:
        if first:
            files = {
                path.relative_to(temporary).as_posix(): FileRecord.of(path)
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            info = CheckpointInfo(step, samples, world.size, zero_stage, precision, files)
            durable.write_json(temporary / MANIFEST_NAME, asdict(info))
            durable.commit_folder(temporary, final)
            for old in list_checkpoints(output_dir)[:-keep]:
                shutil.rmtree(old)
    return final


def check_fits(folder: Path, world: World, zero_stage: int) -> CheckpointInfo:
    """What a checkpoint is; raises UserError when another world size or ZeRO stage wrote it, or it is damaged."""
    info = read_info(folder)
    if (info.world_size, info.zero_stage) != (world.size, zero_stage):
        raise UserError(
            f"{folder} was written by {info.world_size} ranks at ZeRO stage {info.zero_stage}, this start has"
            f" {world.size} ranks at stage {zero_stage}; start it as it was written"
        )
    return info


def load(engine: Any, folder: Path, world: World, *, zero_stage: int) -> CheckpointInfo:
    """Restores DeepSpeed's engine from a checkpoint folder and returns what it is.

    Raises UserError as `check_fits` and `verify` do.
    """
    info = check_fits(folder, world, zero_stage)
    with world.first_alone() as first:
        if first:
            verify(folder, info)
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    if loaded is None or engine.global_steps != info.step:
        raise UserError(f"{folder}: DeepSpeed restored step {engine.global_steps}, expected {info.step}")
    return info
