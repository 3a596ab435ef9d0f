"""A command on several ranks: they meet, compute together, and end together with one message."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import click

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError
from mulki_plugins.ranks.launch import Launch, launched

_MEET = timedelta(minutes=5)
"""How long the ranks wait for one another at the start: machines import the libraries at different speeds."""
_WAIT = timedelta(minutes=60)
"""How long a rank waits for the others in a step: one of them may be writing, or compiling. Failures end it at once."""

_current: list[Any] = []
"""The watch of this process's ranks, if it has any."""
_loud: list[Callable[[], None]] = []
"""What lets a silent process print again."""


def place() -> Launch | None:
    """The place of this process among the ranks that have met; None on one process."""
    return _current[0].launch if _current else None


def on_forced_end(write: Callable[[MulkiError], None] | None) -> None:
    """What the rank that reports does if it must end although its main thread hangs."""
    if _current:
        _current[0].forced = write


def fall_silent() -> None:
    """Let only the first rank print, from the beginning of a command: all of them find the same mistakes in a recipe."""
    launch = launched()
    if launch is None:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are about connections that end with a rank
    _bear_signals()
    if launch.rank and not _loud:
        _loud.append(_silence())


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Within this block the process is one of torchrun's ranks, if torchrun has started it. device: the recipe's.

    Only the first rank prints. If a rank fails, all of them end: the first one with the error, the others in silence with
    the same exit status.
    """
    launch = launched()
    if launch is None:
        yield
        return
    fall_silent()
    before = _bear_signals()
    watch = None
    try:
        watch = _meet(launch, device)
        yield
        _part(watch)
    except BaseException as error:
        if watch is None:  # the others do not know this rank yet
            _speak()
            raise
        _end_together(watch, error)
    finally:
        _forget(before)


def _meet(launch: Launch, device: str) -> Any:
    """Connect the ranks. MulkiError if they do not meet, or if there are fewer GPUs than ranks on this machine."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from mulki_plugins.ranks import collectives
    from mulki_plugins.ranks.failures import Watch

    gpus = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpus:
        _check_gpus(launch, device, torch.cuda.device_count())
        torch.cuda.set_device(launch.local_rank)
    elif device == "mps":
        raise MulkiError("$.device: mps has no communication between ranks", "use --set device=cpu, or one process")
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    try:
        store, _, _ = next(iter(rendezvous("env://", launch.rank, launch.world, timeout=_MEET)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        shared = PrefixStore(f"mulki/{attempt}", store)
        dist.init_process_group(
            backend, store=PrefixStore("group", shared), rank=launch.rank, world_size=launch.world, timeout=_WAIT
        )
        host: Any = dist.new_group(backend="gloo", timeout=_WAIT) if gpus else None
        watch = Watch(launch, PrefixStore("watch", shared), PrefixStore("watch", shared.clone()))
        watch.begin()
        dist.barrier(group=host)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).strip().partition("\n")[0]
        raise MulkiError(
            f"the {launch.world} ranks did not meet at {where}: {reason}", "see docs/distributed.md"
        ) from error
    watch.print_error = _print_error
    _current.append(watch)
    collectives.use(
        collectives.Ranks(launch.rank, launch.world, host, broken=lambda error: watch.missing(), heard=watch.heard)
    )
    _hide_from_avalanche()
    return watch


def _check_gpus(launch: Launch, device: str, gpus: int) -> None:
    if device.startswith("cuda:"):
        raise MulkiError(f"$.device: {device} is one GPU, and each rank needs its own", "use --set device=cuda")
    if gpus < launch.local_world:
        raise MulkiError(
            f"torchrun started {launch.local_world} ranks on this machine, which has {gpus} GPUs",
            f"use --nproc-per-node {gpus}" if gpus else "use --set device=cpu",
        )


def _hide_from_avalanche() -> None:
    """The ranks share out the batches themselves: Avalanche's loaders would draw others on each rank, and fill them up."""
    from avalanche.distributed.distributed_helper import DistributedHelper

    for name, value in {"is_distributed": False, "rank": 0, "world_size": 1}.items():
        setattr(type(DistributedHelper), name, value)


def _part(watch: Any) -> None:
    """The end of a command that succeeded."""
    import torch.distributed as dist

    watch.end()
    dist.destroy_process_group()


def _end_together(watch: Any, error: BaseException) -> None:
    """Raise the error on the first rank. The others wait until it is reported, and exit."""
    from mulki_plugins.ranks.failures import record_of

    watch.ending = True
    record = watch.record(error)
    _disconnect()
    status = record.status if record is not None else getattr(error, "status", 1)
    if watch.launch.rank == 0:
        if isinstance(error, MulkiError) and error.status == status:
            first: BaseException = error
        else:
            first = record.error() if record is not None and record.rank else error
        if isinstance(first, MulkiError):
            _print_error(first)
            watch.say_reported()
            _linger()
            raise SystemExit(first.status) from error
        watch.say_reported()
        raise error
    if not watch.wait_until_reported(record):
        shown = record_of(error, watch.launch.rank) if record is None else record
        _print_error(shown.error())
        watch.say_reported()
        sys.stderr.flush()
    os._exit(status)


def _linger() -> None:
    """Give the others the time to read that the failure is reported, if the first rank keeps their store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        time.sleep(0.5)


def _disconnect() -> None:
    """Let the others notice at once that this rank has left: gloo's operations end when a connection is closed."""
    import torch.distributed as dist

    if dist.get_backend() == "gloo":
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def _forget(before: Any) -> None:
    from mulki_plugins.ranks import collectives

    collectives.use(None)
    _current.clear()
    if before is not None:
        signal.signal(signal.SIGTERM, before)


def _print_error(error: MulkiError) -> None:
    _speak()
    for line in error.lines():
        click.echo(f"error: {printable(line)}", err=True)


def _speak() -> None:
    while _loud:
        _loud.pop()()


def _silence() -> Callable[[], None]:
    """Let this process print nothing, wherever `sys.stdout` writes to. Returns what lets it print again."""
    sys.stdout.flush()
    sys.stderr.flush()
    numbers = {1, 2}
    with suppress(OSError, ValueError):  # it may have no descriptor
        numbers.add(sys.stdout.fileno())
    kept = {number: os.dup(number) for number in numbers}
    nothing = os.open(os.devnull, os.O_WRONLY)
    for number in numbers:
        os.dup2(nothing, number)
    os.close(nothing)

    def restore() -> None:
        sys.stdout.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)

    return restore


def _bear_signals() -> Any:
    """torchrun sends SIGTERM when another rank has failed: this one may still be reporting it, and ends by itself."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def end_later(number: int, frame: object) -> None:
        timer = threading.Timer(8, os._exit, [128 + number])
        timer.daemon = True
        timer.start()

    return signal.signal(signal.SIGTERM, end_later)
