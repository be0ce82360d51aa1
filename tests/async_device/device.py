"""Builds the asynchronous device, and puts it under torch as ``sim``, its process group as ``simccl``.

    sim = load()                                        # in each process that wants it, after torch's import
    dist.init_process_group(BACKENDS)                   # host tensors over gloo, the device's over simccl
    run(train, 4, delay_us=2000, schedule="1F1B")       # train(rank, schedule=...) on 4 ranks, stages on the device

The extension is built at its first use into ``build/async_device``, and what has changed (sources, torch, flags) again;
a lock lets one process build and the others wait. It is part of the tests and never shipped.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pp_runtime.running import register_communicator, register_peer_memory
from tests.helpers import pipelines, ranks

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
BUILD = HERE.parent.parent / "build" / "async_device"
NAME = "_async_device"
DEVICE = torch.device("privateuseone", 0)  # "sim", once it is loaded
BACKEND = "simccl"
BACKENDS = f"cpu:gloo,sim:{BACKEND}"
DELAY_US = 1000
FLAGS = "-std=c++20 -O1 -g0 -fPIC -fvisibility=hidden -Wall -Wextra -Werror".split()


@functools.cache
def load() -> Any:
    """The extension's module, with the device and its backend known to torch and to pp_runtime."""
    spec = importlib.util.spec_from_file_location(NAME, built())
    assert spec is not None and spec.loader is not None
    sim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sim)
    torch.utils.rename_privateuse1_backend("sim")
    sim.register_device()
    torch._register_device_module("sim", _device_module(sim))
    dist.Backend.register_backend(BACKEND, functools.partial(_make_group, sim), devices=["sim"])
    register_communicator(BACKEND, functools.partial(_make_communicator, sim))
    register_peer_memory("sim", lambda device: sim.PeerMemory())
    return sim


def run(
    fn: Callable[..., Any],
    count: int,
    timeout: float = 60.0,
    *,
    delay_us: int = DELAY_US,
    seed: int = 1,
    rendezvous: bool = True,
    deaths: Collection[int] = (),
    **kwargs: Any,
) -> list[Any]:
    """``ranks.run``, with what tests/helpers/pipelines.py makes on the device.

    Before one task in three a stream waits for up to ``delay_us``, drawn from ``seed`` and the rank. With
    ``rendezvous`` a stream that sends waits for its receiver.
    """
    __tracebackhide__ = True
    built()  # here, so that no rank's time limit holds it
    behaviour = {"delay_us": delay_us, "seed": seed, "rendezvous": rendezvous}
    options: Any = {"deaths": deaths, "backend": BACKENDS, "prepare": load}
    return ranks.run(_on_device, count, timeout, **options, call=(fn, behaviour, kwargs))


def _on_device(rank: int, call: tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]) -> Any:
    fn, behaviour, kwargs = call
    sim = load()
    sim.set_delays(behaviour["delay_us"], 3, 1000 * behaviour["seed"] + rank)
    sim.set_rendezvous(behaviour["rendezvous"])
    with pipelines.on(DEVICE):
        return fn(rank, **kwargs)


def _make_group(sim: Any, store: dist.Store, rank: int, size: int, timeout: Any) -> Any:
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)
    return sim.Group(store, rank, size, BACKEND, gloo)


def _make_communicator(sim: Any, store: dist.Store, rank: int, size: int, **_: Any) -> Any:
    return sim.Group(store, rank, size, BACKEND)


def send_through_communicators() -> None:
    """Have the channels that this process opens from now on send as they do between devices that share no memory."""
    os.environ["PP_RUNTIME_TRANSPORT"] = "c10d"


def _device_module(sim: Any) -> types.ModuleType:
    """What torch and its libraries look for as ``torch.sim``."""
    module: Any = types.ModuleType("torch.sim")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None  # random numbers are drawn from the host's generator
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.synchronize = lambda device=None: sim.synchronize()
    module.current_stream = lambda device=None: torch.accelerator.current_stream()
    module.device = lambda index: contextlib.nullcontext()
    module.Stream, module.Event = torch.Stream, torch.Event
    return module


def built() -> Path:
    """The extension's file, built if need be: what has changed is compiled again."""
    included = [*HERE.glob("csrc/*.h"), CSRC / "oversight" / "peer_memory.h"]
    headers = _digest([*FLAGS, torch.__version__, sysconfig.get_python_version()], included)
    objects = {BUILD / f"{path.stem}-{_digest([headers], [path])}.o": path for path in HERE.glob("csrc/*.cpp")}
    target = BUILD / _digest(sorted(made.name for made in objects), []) / f"{NAME}.so"
    with _locked(BUILD / "lock"):
        if not target.exists():
            _build(objects, target)
    return target


def _digest(words: Iterable[str], paths: Iterable[Path]) -> str:
    digest = hashlib.sha256(" ".join(words).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(objects: dict[Path, Path], target: Path) -> None:
    from torch.utils import cpp_extension

    for old in set(BUILD.glob("*.o")) - set(objects):
        old.unlink()
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    flags = [*FLAGS, f"-I{CSRC}"] + [word for path in includes for word in ("-isystem", path)]

    def compile_one(made: Path) -> None:
        _run(["g++", *flags, "-c", str(objects[made]), "-o", f"{made}.new"])
        Path(f"{made}.new").rename(made)

    # The largest first, so that no core is idle in the end.
    missing = sorted((made for made in objects if not made.exists()), key=lambda made: -objects[made].stat().st_size)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        list(pool.map(compile_one, missing))
    libraries = Path(torch.__file__).parent / "lib"
    target.parent.mkdir(exist_ok=True)
    linked = target.with_suffix(".new")
    names = ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    _run(["g++", "-shared", *map(str, objects), "-o", str(linked), f"-L{libraries}", *names, f"-Wl,-rpath,{libraries}"])
    linked.rename(target)


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"building the asynchronous device failed: {' '.join(command)}\n{finished.stderr[-8000:]}")
