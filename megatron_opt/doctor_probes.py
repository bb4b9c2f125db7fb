"""What the doctor asks one rank: each function gives a value, or a complaint (None for none)."""

import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COPY_GB = 0.064
WRITE_GB = 0.016
_CLOCK_SECONDS = 1.0
_REPEATS = 3


def host() -> str:
    """Name of this rank's host."""
    return socket.gethostname()


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def connect(timeout: int) -> None:
    """Join the job's process group."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=timeout))


def disconnect() -> None:
    """Leave it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def extension() -> str:
    """State and source hash of the native kernels."""
    try:
        native = importlib.import_module("megatron_opt._C")
    except ImportError:
        return "not built"
    return f"{native.source_hash}, {'with' if native.cuda else 'without'} CUDA, for torch {native.torch_version}"


def sources() -> str:
    """Digest of this package's Python files: two nodes with the same version may still differ."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def accelerator() -> str:
    """GPU model and driver runtime, or the processor."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(device())}, CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version()}"
    return f"CPU {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


VERSIONS: dict[str, Callable[[], str]] = {
    "python": platform.python_version,
    "torch": lambda: torch.__version__,
    "megatron-core": lambda: _installed("megatron-core"),
    "megatron_opt": sources,
    "native kernels": extension,
    "transformer-engine": lambda: _installed("transformer-engine"),
    "apex": lambda: _installed("apex"),
    "accelerator": accelerator,
}


def transformer_engine_complaint() -> str | None:
    """Why an installed Transformer Engine cannot be imported, and what mends it; None where it loads or is not there."""
    if _installed("transformer-engine") == "not installed" or not torch.cuda.is_available():
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a wheel built for another torch or cuBLAS fails in many ways
        return te_remedy(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return None


def te_remedy(error: str) -> str:
    """The sentence for an import of Transformer Engine that failed."""
    if "cublasLt" in error and "undefined symbol" in error:
        remedy = "this wheel wants a newer cuBLAS than torch's: pip install --no-deps 'nvidia-cublas>=13.2,<14', or use docker/"
    elif "undefined symbol" in error or "transformer_engine_torch" in error:
        remedy = "it was built for another torch: pip install --no-build-isolation 'megatron-opt[gpu]', or use docker/"
    else:
        remedy = "reinstall it by pip install --no-build-isolation 'megatron-opt[gpu]', or use docker/"
    return f"{remedy} ({error[:160]})"


def environment() -> str:
    """Variables that must not differ between ranks."""
    kinds = ("NCCL_", "TORCH_NCCL_", "OMP_NUM_", "MEGATRON_OPT_", "CUBLAS_", "NVTE_")
    names = [name for name in os.environ if name.startswith(kinds) and not name.startswith("NCCL_DEBUG")]
    values = [f"{name}={os.environ[name]}" for name in sorted(names)]
    return " ".join(values) or "no settings"


def open_files() -> float:
    """Soft limit of open files."""
    return float(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def locked_memory_gb() -> float | None:
    """Soft limit of locked memory, which InfiniBand needs; None is unlimited."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY or not torch.cuda.is_available() else limit / 1e9


def shared_memory_gb() -> float:
    """Free space in /dev/shm, which data loaders and NCCL use."""
    return shutil.disk_usage("/dev/shm").free / 1e9


def free_memory_gb() -> float:
    """Memory that this rank's device can still give."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(device())[0] / 1e9
    import psutil

    return float(psutil.virtual_memory().available / 1e9)


def clock_complaint(rank: int, world: int) -> str | None:
    """Offset to rank 0's clock beyond a second, by the shortest of three round trips through the store."""
    if world == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    complaint = None
    for other in range(1, world):  # one at a time, so that no answer waits for another
        for trip in range(_REPEATS):
            if rank == 0:
                store.get(f"doctor/ask/{other}/{trip}")
                store.set(f"doctor/answer/{other}/{trip}", repr(time.time()))
            elif rank == other:
                sent = time.time()
                store.set(f"doctor/ask/{other}/{trip}", "")
                theirs = float(store.get(f"doctor/answer/{other}/{trip}"))
                back = time.time()
                offset, doubt = (sent + back) / 2 - theirs, (back - sent) / 2
                complaint = None if abs(offset) <= _CLOCK_SECONDS + doubt else f"clock {offset:+.1f} s off rank 0's"
    return complaint


def _timed(work: Callable[[], Any]) -> float:
    """Shortest of a few runs after one to warm up, in seconds."""
    best = float("inf")
    for attempt in range(_REPEATS + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if attempt:
            best = min(best, time.perf_counter() - began)
    return best


def matmul_seconds() -> float:
    """Time of one square matrix product, 8192 on a GPU and 512 on a CPU."""
    size = 8192 if torch.cuda.is_available() else 512
    x = torch.randn(size, size, device=device(), dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    return _timed(lambda: x @ x)


def copy_seconds() -> float:
    """Time to copy COPY_GB within this device's memory."""
    x = torch.zeros(int(COPY_GB * 1e9) // 4, device=device())
    y = torch.empty_like(x)
    return _timed(lambda: y.copy_(x))


def make_group(groups: list[list[int]], rank: int) -> Any:
    """This rank's group of a kind; every rank makes all of them, in one order."""
    mine = None
    for ranks in groups:
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = group
    return mine


def _all_reduce(x: Tensor, group: Any) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


def _reduce_scatter(x: Tensor, group: Any) -> Tensor:
    out = torch.empty(x.numel() // group.size(), dtype=x.dtype, device=x.device)
    dist.reduce_scatter_single(out, x, group=group)
    return out


def _all_gather(x: Tensor, group: Any) -> Tensor:
    n = group.size()
    out = torch.empty_like(x)
    dist.all_gather_single(out, x.view(n, -1)[group.rank()].contiguous(), group=group)
    return out


def _all_to_all(x: Tensor, group: Any) -> Tensor:
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


COLLECTIVES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "all-reduce": _all_reduce,
    "reduce-scatter": _reduce_scatter,
    "all-gather": _all_gather,
    "all-to-all": _all_to_all,
}


def _expected(collective: Callable[[Tensor, Any], Tensor], rank: int, n: int) -> list[int]:
    """What the collective makes of x[i, j] = 100·rank + i, i < n, j < 4."""
    total = 100 * (n * (n - 1) // 2)
    rows: dict[Callable[[Tensor, Any], Tensor], list[int]] = {
        _all_reduce: [total + n * i for i in range(n)],
        _reduce_scatter: [total + n * rank],
        _all_gather: [101 * i for i in range(n)],
        _all_to_all: [100 * i + rank for i in range(n)],
    }
    return [value for value in rows[collective] for _ in range(4)]


def wrong_sum(collective: Callable[[Tensor, Any], Tensor], group: Any) -> str | None:
    """Whole numbers through a collective must come back exact."""
    n, rank = group.size(), group.rank()
    x = (100 * rank + torch.arange(n, device=device(), dtype=torch.float32)).repeat_interleave(4)
    got = collective(x, group).tolist()
    return None if got == _expected(collective, rank, n) else f"wrong numbers: {got[:4]}"


def seconds_of(collective: Callable[[Tensor, Any], Tensor], group: Any, size: int) -> float:
    """Time of a collective on `size` bytes a rank."""
    n = group.size()
    x = torch.zeros(max(1, size // 4 // n) * n, device=device())
    return _timed(lambda: collective(x, group))


def shared_folder_complaint(folder: Path, rank: int, world: int) -> str | None:
    """Every rank's file, written and synced, must be readable by every other."""
    base = folder / f".doctor-{os.environ.get('TORCHELASTIC_RUN_ID', 'alone')}"
    token = f"rank {rank}"
    complaint = None
    try:
        base.mkdir(exist_ok=True)
        path = base / str(rank)
        with path.open("w") as stream:
            stream.write(token)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        complaint = f"cannot write to {folder}: {error.strerror}"
    dist.barrier()
    for other in range(world):
        try:
            if (base / str(other)).read_text() != f"rank {other}" and complaint is None:
                complaint = f"reads something else than rank {other} wrote under {folder}"
        except OSError as error:
            complaint = complaint or f"does not see rank {other}'s file under {folder} ({error.strerror})"
    dist.barrier()
    if rank == 0:
        shutil.rmtree(base, ignore_errors=True)
    return complaint


def free_space_gb(folder: Path) -> float:
    """Space left on the file system of `folder`."""
    return shutil.disk_usage(folder).free / 1e9


def durable_write_seconds(folder: Path, rank: int) -> float:
    """Time to write and sync WRITE_GB."""
    path = folder / f".doctor-write-{os.environ.get('TORCHELASTIC_RUN_ID', 'alone')}-{rank}"
    block = os.urandom(1 << 20)
    try:
        began = time.perf_counter()
        with path.open("wb") as stream:
            for _ in range(int(WRITE_GB * 1e9) >> 20):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        return time.perf_counter() - began
    finally:
        path.unlink(missing_ok=True)


def dataset_digest(prefix: str) -> str:
    """Sizes and a digest of the head of a .bin/.idx pair, read through Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for end in ("idx", "bin"):
        if not Path(f"{prefix}.{end}").is_file():  # Megatron's reader would leave a traceback of its end
            raise FileNotFoundError(f"{prefix}.{end} is not there")
    dataset = IndexedDataset(prefix)
    first, last = dataset[0], dataset[len(dataset) - 1]
    digest = hashlib.sha256(first.tobytes() + last.tobytes()).hexdigest()[:8]
    return f"{len(dataset):,} documents, {Path(prefix + '.bin').stat().st_size / 1e9:.3f} GB, {digest}"
