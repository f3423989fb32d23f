"""Saving while training goes on, and loading: the two ends of a checkpoint, on every rank alike.

A save is taken between two steps and written beside the next ones. What DeepSpeed would write is collected; its tensors
are copied to host memory while the next forward and backward pass only read them, at the latest until the weights
change (as CheckFreq does: Mohan et al. 2021, section 4.1); then a thread writes, digests and fsyncs this rank's files
into a folder with a temporary name. All ranks tell one another what they wrote. When every file of every rank is on
disk, rank 0 writes the manifest, renames the folder and moves the pointer; otherwise nothing gets a final name.

The folder has to be on storage that all ranks share: rank 0 looks at every file before it commits.
This module imports torch as it is imported; `pipeline.pretrain` imports it where it is needed.
"""

import contextlib
import hashlib
import os
import random
import secrets
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from data_prep import durable
from data_prep.errors import UserError
from data_prep.manifest import FileRecord
from pipeline import checkpoint
from pipeline.checkpoint import CheckpointInfo, Sources
from pipeline.engine import Engine
from pipeline.recipe import CheckpointSection

States = dict[str, Any]
"""What one rank's files hold, by their names: nested dicts, lists and tuples of tensors and other values."""

_SMALL_BYTES = 1 << 16  # copied at once: a thread would take longer to hand over
PARAMETER_NAMES = "parameter_names"


class StateFiles:
    """Stands in for DeepSpeed's checkpoint engine (the methods are its interface): keeps what would be written, and
    gives for a file what `read` says."""

    def __init__(self, read: Callable[[str], Any] | None = None) -> None:
        self.taken: States = {}
        self._read = read

    def save(self, state_dict: Any, path: str) -> None:
        self.taken[Path(path).name] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        assert self._read is not None
        return self._read(Path(path).name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def cleanup(self) -> None: ...

    def preserves_storage_sharing(self) -> bool:
        return True


@contextlib.contextmanager
def _in_place_of_files(deepspeed: Any, files: StateFiles) -> Iterator[None]:
    """DeepSpeed's engine saves to and loads from `files`, and puts no script beside them."""
    before, deepspeed.checkpoint_engine = deepspeed.checkpoint_engine, files
    deepspeed._copy_recovery_script = lambda _: None
    try:
        yield
    finally:
        deepspeed.checkpoint_engine = before
        del deepspeed._copy_recovery_script


def collect(deepspeed: Any, temporary: Path) -> States:
    """What DeepSpeed saves on this rank: its tensors are the engine's own, not copies. Called on every rank.

    temporary: the folder that the files will be in; DeepSpeed itself copies there what it keeps on NVMe.
    """
    files = StateFiles()
    with _in_place_of_files(deepspeed, files):
        deepspeed.save_checkpoint(
            str(temporary.parent),
            tag=temporary.name,
            client_state={PARAMETER_NAMES: parameter_names(deepspeed)},
            save_latest=False,
        )
    return files.taken


def restore(deepspeed: Any, folder: Path, read: Callable[[str], Any]) -> None:
    """DeepSpeed's load_checkpoint with files that `read` gives by their names; folder: has files of those names."""
    with _in_place_of_files(deepspeed, StateFiles(read)):
        loaded, _ = deepspeed.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    assert loaded is not None, folder


def parameter_names(deepspeed: Any) -> list[list[str]]:
    """The names of the parameters of each group of an unsharded optimizer, whose states have numbers; else empty."""
    optimizer = deepspeed.optimizer
    if deepspeed.zero_optimization():
        return []
    groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
    return [[deepspeed.param_names[parameter] for parameter in group] for group in groups]


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested states with where it is, in their order."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from tensors(inner, f"{path}/{index}")


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def digest(states: States) -> str:
    """The sha256 of every tensor of a rank's states: place, type, shape and bytes."""
    found = hashlib.sha256()
    for path, tensor in sorted(tensors(states), key=lambda item: item[0]):
        found.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            found.update(_bytes_of(tensor))
    return found.hexdigest()


class HostCopies:
    """Host memory for copies of a rank's states, used again from save to save."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, states: States) -> tuple[States, Callable[[], None]]:
        """The copy and what has to be called, in any thread, to fill it; until then `states` must not change.

        Small tensors and what is no tensor are copied at once. The copy is whole until the next `begin`.
        """
        self._next = 0
        self._seen: dict[Any, Tensor] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        copy = {name: self._copied(state) for name, state in states.items()}
        del self._buffers[self._next :]
        pairs = self._pairs
        del self._pairs, self._seen
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

        def fill() -> None:
            if self._stream is None:
                for target, source in pairs:
                    _copy_bytes(target, source)
            else:
                with torch.cuda.stream(self._stream):
                    for target, source in pairs:
                        target.copy_(source, non_blocking=True)
                self._stream.synchronize()
            pairs.clear()

        return copy, fill

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_of(value.detach())
        if type(value) is dict or type(value) is OrderedDict:
            copy = type(value)((key, self._copied(inner)) for key, inner in value.items())
            if isinstance(copy, OrderedDict):  # torch's state_dict has versions of its modules as an attribute
                copy.__dict__.update(deepcopy(value.__dict__))
            return copy
        if type(value) is list or type(value) is tuple:
            return type(value)(self._copied(inner) for inner in value)
        if value is None or isinstance(value, int | float | str | torch.Size):
            return value
        return deepcopy(value)  # such as the loss scale, which changes

    def _copy_of(self, tensor: Tensor) -> Tensor:
        if tensor.nbytes <= _SMALL_BYTES:
            return tensor.cpu().clone()
        # Tied weights are one tensor under several names.
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        if key not in self._seen:
            target = self._buffer(tensor)
            self._seen[key] = target
            self._pairs.append((target, tensor))
        return self._seen[key]

    def _buffer(self, tensor: Tensor) -> Tensor:
        if self._next == len(self._buffers):
            self._buffers.append(torch.empty(0))
        if (found := self._buffers[self._next]).shape != tensor.shape or found.dtype != tensor.dtype:
            self._buffers[self._next] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
            )
        self._next += 1
        return self._buffers[self._next - 1]


def _copy_bytes(target: Tensor, source: Tensor) -> None:
    """On the host, by one core: torch's own copy would take all of this rank's threads from the training."""
    if source.device.type == "cpu" and source.is_contiguous():
        np.copyto(target.reshape(-1).view(torch.uint8).numpy(), source.reshape(-1).view(torch.uint8).numpy())
    else:
        target.copy_(source)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Of every random generator of this process. Nothing of ours draws from them, but a library may."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "python": (version, torch.tensor(internal, dtype=torch.int64), following),
    }


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, following = states["python"]
    random.setstate((version, tuple(internal.tolist()), following))


def generators_name(rank: int) -> str:
    return f"generators_rank_{rank:05d}.pt"


@dataclass(frozen=True)
class _Written:
    """What one rank has on disk: its files and the digest of its tensors; or why it has not."""

    files: dict[str, FileRecord]
    digest: str
    failure: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank: its folder, or why there is none."""

    step: int
    folder: Path
    failure: str | None


@dataclass
class Stalls:
    """Seconds that training has waited for checkpoints: at their start, for copies before the weights changed, and for
    a save that was still under way when the next was due."""

    starting: float = 0.0
    copying: float = 0.0
    queueing: float = 0.0

    @property
    def seconds(self) -> float:
        return self.starting + self.copying + self.queueing


class Due:
    """When checkpoints are due: every so many steps or minutes, and after the last step.

    Each rank has its own clock: a rank whose minutes are over asks, and all save after the same step
    (Engine.train_step).
    """

    def __init__(self, settings: CheckpointSection, max_steps: int) -> None:
        self._settings, self._max_steps = settings, max_steps
        self._last = time.monotonic()

    def asks(self) -> bool:
        """Whether this rank's minutes are over."""
        minutes = self._settings.every_minutes
        return minutes is not None and time.monotonic() - self._last >= minutes * 60

    def at(self, step: int, asked: bool) -> bool:
        """Whether to save after step `step`; asked: any rank does."""
        every = self._settings.every_steps
        due = asked or step == self._max_steps or (every > 0 and step % every == 0)
        if due:
            self._last = time.monotonic()
        return due


class Checkpointer:
    """The checkpoints of a run: `save`, `wait`, `load`; each is called on every rank at the same point of the run.

    sources: of the run, for the manifest. say: what a line for people goes to, on rank 0, possibly from another
    thread. stalls: so far.
    """

    def __init__(
        self,
        engine: Engine,
        output_dir: Path,
        settings: CheckpointSection,
        *,
        zero_stage: int,
        precision: str,
        sources: Sources,
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._world, self._output_dir, self._settings = engine, engine.world, output_dir, settings
        self._zero_stage, self._precision, self._sources, self._say = zero_stage, precision, sources, say
        self._parent = output_dir / checkpoint.CHECKPOINTS
        # The writing threads agree among themselves, whatever the ranks' main threads do meanwhile.
        self._group = distributed.new_group(backend="gloo")
        self._owner: str = self._world.gather(f"{durable.host_name()}-{os.getpid()}")[0]
        self._copies = HostCopies(self._world.device)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._copied = Event()
        self._copied.set()
        self._pending: Future[Outcome] | None = None
        self._last: Outcome | None = None
        self._failures = 0
        self._saved_step = 0
        self.stalls = Stalls()
        self._has_saved = False
        engine.before_update = self._wait_for_copy

    def save(self, step: int, samples: int, learning_rate: float) -> None:
        """Takes a checkpoint of the state after `step` steps; with `checkpoint.background` it is written meanwhile.

        samples: consumed so far. learning_rate: of the last step. Waits for the save before. Raises UserError as
        `wait`; a save that fails is said in a line and is no error before the next call.
        """
        self.wait()
        if self._last is not None and self._last.failure is None and self._last.step == step:
            return  # there already, such as at a signal right after one that was due
        started = time.perf_counter()
        if not self._has_saved:
            self._has_saved = True
            with self._world.first_alone() as first:
                if first:  # what killed starts have left
                    durable.remove_temporary_files(self._output_dir, alone=True)
        final = self._parent / checkpoint.folder_name(step)
        token: str = self._world.gather(secrets.token_hex(4))[0]
        temporary = final.with_name(f"{final.name}.{self._owner}-{token}{durable.TEMPORARY_SUFFIX}")
        states = collect(self._engine.deepspeed, temporary)
        states[generators_name(self._world.rank)] = generator_states(self._world.device)
        copy, fill = self._copies.begin(states)
        self._copied.clear()

        def write() -> Outcome:
            try:
                fill()
            finally:
                self._copied.set()
            return self._write(copy, temporary, final, step, samples, learning_rate, started)

        if self._settings.background:
            self._pending = self._thread.submit(write)
        else:
            self._pending = Future()
            self._pending.set_result(write())
        self.stalls.starting += time.perf_counter() - started
        if not self._settings.background:
            self.wait()

    def _wait_for_copy(self) -> None:
        if not self._copied.is_set():
            started = time.perf_counter()
            self._copied.wait()
            self.stalls.copying += time.perf_counter() - started

    @property
    def is_idle(self) -> bool:
        """Whether no save of this rank is under way."""
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises UserError, on every rank alike, when `checkpoint.max_failures` in a row have failed.
        """
        if self._pending is None:
            return
        started = time.perf_counter()
        pending, self._pending = self._pending, None
        self._last = pending.result()
        self.stalls.queueing += time.perf_counter() - started
        if self._last.failure is None:
            self._failures, self._saved_step = 0, self._last.step
        else:
            self._failures += 1
        if self._failures >= self._settings.max_failures:
            raise UserError(
                f"{self._failures} checkpoints in a row could not be saved, the last at step {self._last.step}:"
                f" {self._last.failure}; make room or mend it, and the same command goes on from the newest whole one"
            )

    def last_saved(self) -> int:
        """The step of the newest checkpoint of this run, 0 for none, once no save is under way."""
        outcome = self._last if self._pending is None else self._pending.result()
        if outcome is not None and outcome.failure is None:
            return outcome.step
        return self._saved_step

    def settle(self) -> None:
        """Lets a save that is under way come to its end, whatever that is: for a run that ends otherwise."""
        if self._pending is not None:
            with contextlib.suppress(Exception):
                self._pending.result()

    def close(self) -> None:
        """`wait`, and the end of saving. Raises UserError as well when the last save failed."""
        self.wait()
        self._thread.shutdown()
        if self._last is not None and self._last.failure is not None:
            raise UserError(
                f"the last checkpoint, of step {self._last.step}, could not be saved: {self._last.failure}; the same"
                " command goes on from the one before"
            )

    def _write(
        self,
        states: States,
        temporary: Path,
        final: Path,
        step: int,
        samples: int,
        learning_rate: float,
        started: float,
    ) -> Outcome:
        """Writes this rank's files and commits them with all the others'. In the writing thread of every rank."""
        written: list[_Written] = self._gather(self._files_written(states, temporary))
        failure: str | None = next((one.failure for one in written if one.failure is not None), None)
        if self._world.is_first:
            if failure is None:
                info = CheckpointInfo(
                    step=step,
                    samples=samples,
                    learning_rate=learning_rate,
                    world_size=self._world.size,
                    zero_stage=self._zero_stage,
                    precision=self._precision,
                    sources=self._sources,
                    digests=tuple(one.digest for one in written),
                    files={name: record for one in written for name, record in sorted(one.files.items())},
                )
                failure = self._commit(info, temporary, final)
            if failure is None:
                self._committed(info, final, time.perf_counter() - started)
            else:
                shutil.rmtree(temporary, ignore_errors=True)
                self._say(f"checkpoint of step {step} not saved: {failure}; training goes on")
        (failure, *_) = self._gather(failure)
        return Outcome(step, final, failure)

    def _gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self._world.size
        distributed.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _files_written(self, states: States, temporary: Path) -> _Written:
        generators = generators_name(self._world.rank)
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            files = {}
            for path in sorted(temporary.glob(f"offloaded_tensors/rank{self._world.rank:02d}/**/*")):
                if path.is_file():  # DeepSpeed's copies of what is on NVMe
                    durable.fsync_file(path)
                    files[path.relative_to(temporary).as_posix()] = FileRecord.of(path)
            for name, state in states.items():
                files[name] = write_state(temporary / name, state)
            return _Written(files, digest({name: states[name] for name in states if name != generators}))
        except OSError as error:
            return _Written({}, "", _described(error))
        except Exception as error:  # the other ranks wait for an answer
            return _Written({}, "", f"rank {self._world.rank}: {error!r}")

    def _commit(self, info: CheckpointInfo, temporary: Path, final: Path) -> str | None:
        """Gives the folder its name; why not, else."""
        try:
            for name, record in info.files.items():
                if (found := os.stat(temporary / name).st_size) != record.bytes:
                    return f"rank 0 finds {found:,} bytes in {temporary / name}, {record.bytes:,} were written"
            with durable.writing(temporary / checkpoint.MANIFEST_NAME) as file:
                file.write(checkpoint.manifest_bytes(info))
            durable.commit_folder(temporary, final)
        except FileNotFoundError as error:
            return f"{_described(error)} on rank 0: --output_dir has to be on storage that all ranks share"
        except OSError as error:
            return _described(error)
        return None

    def _committed(self, info: CheckpointInfo, final: Path, seconds: float) -> None:
        self._say(f"checkpoint {final}, {info.bytes / 1e6:,.1f} MB in {seconds:.1f} s")
        try:
            checkpoint.write_pointer(self._output_dir, info.step)
            present = checkpoint.list_checkpoints(self._output_dir)
            for old in checkpoint.to_prune(present, self._settings.keep_last, self._settings.keep_every):
                durable.remove_folder(old)
        except OSError as error:
            self._say(f"checkpoint {final} is whole, but not all before it could be put in order: {_described(error)}")

    def load(self, folder: Path, *, goes_on: bool = True) -> CheckpointInfo:
        """Puts the engine into the state of a checkpoint, also in the middle of a run, and verifies that it is in it.

        Another world size, ZeRO stage or precision is carried over parameter by parameter (pipeline.reshape). Where the
        run goes on from there, newer checkpoints of it are of a future that will not be: they are renamed. Raises
        UserError, on every rank, when the checkpoint is damaged or cannot be carried over.
        """
        self.wait()
        info = checkpoint.verify_together(folder, self._world)
        deepspeed, rank = self._engine.deepspeed, self._world.rank
        if self.has_layout_of(info):
            restore(deepspeed, folder, lambda name: read_state(folder, name, info))
            found: Any = digest(collect(deepspeed, folder))
            expected: Any = info.digests[rank]
        else:
            from pipeline import reshape

            found, expected = reshape.load(deepspeed, folder, info, self._world), []
        faults = [
            f"{name} {value!r} instead of {wanted!r}"
            for name, value, wanted in (
                ("step", deepspeed.global_steps, info.step),
                ("learning rate", deepspeed.optimizer.param_groups[0]["lr"], info.learning_rate),
                ("weights and optimizer states", found, expected),
            )
            if value != wanted
        ]
        for other, theirs in enumerate(self._world.gather(faults)):
            if theirs:
                raise UserError(f"{folder}: after loading, rank {other} has {'; '.join(theirs)}")
        name = generators_name(rank)
        if name in info.files:
            set_generator_states(read_state(folder, name, info, weights_only=True), self._world.device)
        own = folder.resolve().parent == self._parent.resolve()
        if own and goes_on:
            self._set_aside_after(info.step)
        self._last, self._failures = Outcome(info.step, folder, None) if own else None, 0
        self._saved_step = info.step
        return info

    def has_layout_of(self, info: CheckpointInfo) -> bool:
        """Whether DeepSpeed can take a checkpoint's files as they are."""
        return (info.world_size, info.zero_stage, info.precision) == (
            self._world.size,
            self._zero_stage,
            self._precision,
        )

    def _set_aside_after(self, step: int) -> None:
        with self._world.first_alone() as first:
            if not first:
                return
            for newer in checkpoint.list_checkpoints(self._output_dir):
                if checkpoint.step_of(newer) > step:
                    aside = newer.with_name(f"abandoned-{newer.name}-{secrets.token_hex(4)}")
                    durable.rename_folder(newer, aside)
                    self._say(f"checkpoint {newer} is of steps that are taken anew: renamed {aside.name}")
            checkpoint.write_pointer(self._output_dir, step)


def write_state(path: Path, state: Any) -> FileRecord:
    """Writes what torch.load reads, fsynced. Raises OSError."""
    with durable.writing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch's writer says "unexpected pos" when it closes a file that could not be written.
            raise _os_error_of(error) from None
    return FileRecord(file.bytes, file.sha256)


def _os_error_of(error: BaseException) -> BaseException:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


def read_state(folder: Path, name: str, info: CheckpointInfo, *, weights_only: bool = False, mmap: bool = False) -> Any:
    """What a file of a verified checkpoint holds."""
    if name not in info.files:
        raise UserError(f"{folder} has no {name}, which DeepSpeed asks for")
    return torch.load(folder / name, map_location="cpu", weights_only=weights_only, mmap=mmap)


def _described(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"
