"""DeepSpeed's C++ ops, built where everybody sees it and never waited for in silence.

DeepSpeed compiles an op when a run first needs it, through torch.utils.cpp_extension.load. torch guards a
build by the mere existence of a file named `lock`; a process that is killed while it builds leaves that file,
and every later start waits for it for ever without a word. Here a run builds what it needs ahead, one process
a host at a time under a lock that the kernel releases, and a `lock` that nobody holds is removed.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.ds_config import offload_device

CPU_ADAM = "cpu_adam"
PIN_MEMORY = "pin_memory"
ASYNC_IO = "async_io"
GPU_DIRECT = "gds"
_BUILDERS = {
    CPU_ADAM: "CPUAdamBuilder",
    PIN_MEMORY: "PinMemoryBuilder",
    ASYNC_IO: "AsyncIOBuilder",
    GPU_DIRECT: "GDSBuilder",
}
# Measured with two cores; what the user reads before the wait.
_EXPECTED_BUILD_SECONDS = {CPU_ADAM: 60}
_POLL_SECONDS = 0.1
_WHAT_TO_INSTALL = (
    "install a C++ compiler, Python's headers and ninja "
    "(Debian: apt install g++ python3-dev ninja-build), and libaio-dev for NVMe offload"
)


def extensions_folder() -> Path:
    """Where compiled ops are kept: TORCH_EXTENSIONS_DIR if set, else a folder of this Python environment's own.

    The folder is named for the Python and torch versions and the processor: ops are built with -march=native,
    and machines with different processors may share one environment over a network file system. Where the
    environment is not writable, the folder is in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).
    """
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen)
    name = f"py{sys.version_info.major}{sys.version_info.minor}_torch{version('torch')}_{_processor_digest()}"
    of_environment = Path(sys.prefix) / "var" / "torch_extensions" / name
    if _can_create(of_environment):
        return of_environment
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    return Path(cache) / "torch_extensions" / f"{name}_{environment}"


def silence_accelerator_notice() -> None:
    """Keeps DeepSpeed from warning, at its import, that there is no GPU: a run's own lines say what there is."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def configure_environment() -> None:
    """Before DeepSpeed is imported: sets TORCH_EXTENSIONS_DIR where the user has not, puts the folder of this Python on
    PATH, and silences the notice of a missing GPU.

    torch starts `ninja` from PATH, and `.venv/bin/deepspeed` without activation does not have .venv/bin
    there.
    """
    silence_accelerator_notice()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    # Not resolved: in a virtual environment the executable is a link to a Python elsewhere.
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if programs not in path.split(os.pathsep):
        os.environ["PATH"] = f"{programs}{os.pathsep}{path}"


def required_ops(ds_config: Mapping[str, Any], device_type: str) -> list[str]:
    """Names of the ops that a run with `ds_config` on `device_type` ("cpu", "cuda") compiles and loads.

    Only offload needs any: the optimizer on the device is torch's own fused AdamW. NVMe needs asynchronous
    I/O as well, and on a GPU with aio.use_gds the GPUDirect variant. Stage 0 offloads nothing.
    """
    optimizer_device, parameter_device = (offload_device(ds_config, what) for what in ("optimizer", "param"))
    names = [CPU_ADAM] if optimizer_device in ("cpu", "nvme") else []
    if "nvme" in (optimizer_device, parameter_device):
        names += [PIN_MEMORY, ASYNC_IO]  # AsyncIOBuilder.load loads the former first.
        if device_type == "cuda" and (ds_config.get("aio") or {}).get("use_gds"):
            names.append(GPU_DIRECT)
    return names


def skip_unused_ops() -> None:
    """Keeps DeepSpeed from compiling its shared-memory communication op on CPU ranks; call before init_distributed.

    TorchBackend.__init__ (deepspeed/comm/torch.py) builds it at every first start, 35 s of g++, although only
    inference_all_reduce uses it, which in training only tensor-parallel layers call (module_inject/layers.py)
    and which falls back to gloo without it; gradients never go through it.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def build_ops(names: list[str], report: Callable[[str], None]) -> None:
    """Compiles and loads the ops `names` into this process, reporting what takes long; silent when all are cached.

    Call it in every rank: one process a host compiles, the others wait for it and say so through `report`.
    Raises UserError when an op cannot be compiled, with the compiler's first error and what to install.
    """
    if not names:
        return
    configure_environment()
    from deepspeed.accelerator import get_accelerator

    for name in names:
        builder = get_accelerator().create_op_builder(_BUILDERS[name])
        build_op(name, extensions_folder(), builder.load, report)


def build_op(name: str, folder: Path, load: Callable[[], object], report: Callable[[str], None]) -> None:
    """Calls `load` under the host's build lock; it compiles the op `name` in `folder`/`name` unless it is there.

    A `lock` of torch's in that folder is waited for while a process of this machine holds it, and removed
    when none does. Raises UserError when `load` cannot compile.
    """
    build_folder = folder / name
    build_folder.mkdir(parents=True, exist_ok=True)
    library = build_folder / f"{name}.so"
    with _build_lock(folder, name, report) as announce:
        left_over = _remove_stale_lock(build_folder / "lock", report)
        compiles = left_over or not library.exists()
        if compiles:
            announce()
            expected = _EXPECTED_BUILD_SECONDS.get(name)
            about = f", about {expected} s" if expected else ""
            report(f"building {name} (C++, once for this environment{about}) ...")
        start = time.monotonic()
        try:
            load()
        except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
            raise UserError(
                f"cannot build {name} in {build_folder}: {_first_error(error)}; {_WHAT_TO_INSTALL}"
            ) from error
        if compiles:
            report(f"built {name} in {time.monotonic() - start:.0f} s")


@contextlib.contextmanager
def _build_lock(folder: Path, name: str, report: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Holds the host's build lock on `folder`; yields a function that tells the waiting that a build goes on."""
    # The descriptor is not inherited by the compiler, so the lock ends with this process.
    descriptor = os.open(folder / "build.flock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                builder = os.pread(descriptor, 256, 0).decode(errors="replace")
                if builder and not told:
                    report(f"waiting for {builder} ...")
                    told = True
                time.sleep(_POLL_SECONDS)
        os.ftruncate(descriptor, 0)

        def announce() -> None:
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()} to build {name}".encode(), 0)

        yield announce
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _remove_stale_lock(lock: Path, report: Callable[[str], None]) -> bool:
    """Waits while a process of this machine builds beside `lock`; True if `lock` was left behind (and removed)."""
    told: int | None = None
    while (builder := _process_building(lock)) is not None:
        if builder != told:
            report(f"waiting for process {builder} to build in {lock.parent} ...")
            told = builder
        time.sleep(_POLL_SECONDS)
    if not lock.exists():
        return False
    lock.unlink(missing_ok=True)
    report(f"removed {lock}, left by a build that was killed")
    return True


def _process_building(lock: Path) -> int | None:
    """Id of a process that has torch's `lock` open, or a compiler that works in its folder; None without one.

    torch keeps the file open while it builds (torch/utils/file_baton.py); ninja and the compiler run in its
    folder and may outlive a killed parent.
    """
    folder = str(lock.parent.resolve())
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        # Processes end while we look, and those of other users cannot be looked into.
        with contextlib.suppress(OSError):
            if os.readlink(process / "cwd") == folder and _is_build_tool(process):
                return int(process.name)
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor) == f"{folder}/{lock.name}":
                        return int(process.name)
    return None


def _is_build_tool(process: Path) -> bool:
    """Whether it is ninja, or writes an object or a library (a shell or an editor in the folder builds nothing)."""
    program, *arguments = (process / "cmdline").read_bytes().split(b"\0")
    return program.endswith(b"ninja") or any(argument.endswith((b".o", b".so")) for argument in arguments)


def _processor_digest() -> str:
    """Eight hex digits for what -march=native depends on: the instruction set and its extensions."""
    flags = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        flags += next((line for line in file if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:8]


def _can_create(folder: Path) -> bool:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return os.access(existing, os.W_OK | os.X_OK)


def _first_error(error: BaseException) -> str:
    """The line of a failed build that tells why: the compiler's first error, else the message's first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for sign in ("error:", "not found", "No such file"):
        for line in lines:
            if sign in line:
                return line
    return lines[0] if lines else type(error).__name__
