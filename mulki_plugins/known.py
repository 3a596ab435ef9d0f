"""Failures of libraries and of the machine that are known by their errors, in MulKI's words, with what to type next."""

from __future__ import annotations

import errno
import re

from mulki_plugins.errors import describe_error

_FEWER_WORKERS = "fewer with train.workers, or 0"
_LESS_MEMORY = (
    "these help: a smaller train.batch_size (or evaluate.batch_size), train.precision=bf16, model.train=image"
)
_SHARED_MEMORY = "allow more, such as by `docker run --shm-size=8g`, or set train.workers=0"
_DAMAGED = "get the file again"

_MACHINE: tuple[tuple[str, str, str], ...] = (
    (
        r"DataLoader worker.*[Bb]us error|unable to (?:open|allocate|write|mmap|resize).*(?:shared memory|torch_|shm)",
        "the memory that processes share (/dev/shm) is full", _SHARED_MEMORY,
    ),
    (
        r"DataLoader worker.*killed by signal: ([\w ]+)",
        "a loader's worker process ended, by the signal {name}", f"it may have been killed for memory: {_FEWER_WORKERS}",
    ),
    (
        r"DataLoader worker",
        "a loader's worker process ended", f"it may have been killed for memory: {_FEWER_WORKERS}",
    ),
    (
        r"Too many open files|received \d+ items of ancdata",
        "too many files are open at once", f"raise the limit, such as by `ulimit -n 65536`; {_FEWER_WORKERS}",
    ),
    (
        r"can't start new thread|Resource temporarily unavailable",
        "no further process or thread can be started", f"raise the limit (`ulimit -u`); {_FEWER_WORKERS}",
    ),
    (
        r"out of memory|can't allocate memory|Cannot allocate memory|DefaultCPUAllocator|Unable to allocate",
        "out of memory", _LESS_MEMORY,
    ),
    (
        r"no kernel image is available|not compatible with the current PyTorch",
        "torch was not built for this GPU", "install the build of torch that is, or set device=cpu",
    ),
    (
        r"driver version is insufficient|NVIDIA driver on your system is too old|no NVIDIA driver",
        "the GPU's driver is missing or too old for this torch", "update it, or set device=cpu",
    ),
    (
        r"device-side assert",
        "a computation on the GPU failed, often for a class or an index that is out of range",
        "run it with device=cpu, which tells where",
    ),
    (
        r"(CUBLAS_STATUS_\w+|CUDNN_STATUS_\w+|cuDNN error)",
        "a library of the GPU failed ({name})", f"it may be out of memory, and then {_LESS_MEMORY}; or set device=cpu",
    ),
    (
        r"(?:CUDA|HIP) error: ([^\n.]+)",
        "the GPU failed: {name}", "go on with `mulki resume`; if it fails again, look after the GPU, or set device=cpu",
    ),
    (
        r"not implemented for '(Half|BFloat16)'",
        "this device cannot compute with {name} numbers", "set train.precision=fp32",
    ),
)  # fmt: skip
"""Regular expressions for an error's type and text, what it means, and what to do; the first that fits counts."""

_FILES: tuple[tuple[str, str, str], ...] = (
    (
        r"[Cc]an(?:'|no)t pickle|Can't get local object",
        "something cannot be handed to a loader's worker process", "set train.workers=0",
    ),
    (
        r"[Ww]eights.only|WeightsUnpickler|Unsupported global",
        "the file of weights holds more than tensors, such as code, which is not loaded",
        "save the model's state_dict alone, best as safetensors",
    ),
    (
        r"PytorchStreamReader|archive is corrupted|corrupt file|magic number|"
        r"HeaderTooLarge|InvalidHeader|HeaderTooSmall|IncompleteBuffer",
        "the file of weights is damaged, or is none", _DAMAGED,
    ),
    (r"PytorchStreamWriter", "a file cannot be written", "make room"),
)  # fmt: skip

_NETWORK: tuple[tuple[str, str, str], ...] = (
    (
        r"CERTIFICATE_VERIFY_FAILED|certificate verify failed",
        "the certificate of the server cannot be checked",
        "is there a proxy in between? SSL_CERT_FILE names the file of its certificate",
    ),
    (
        r"[Nn]ame resolution|Name or service not known|getaddrinfo failed|Network is unreachable|Max retries exceeded|"
        r"Connection refused|timed out|No route to host",
        "the server cannot be reached", "is there a network? else give a local file",
    ),
    (
        r"HTTP Error (\d{3})|(\d{3}) Client Error",
        "the server answered with error {name}", "try again later, or get the file by hand",
    ),
)  # fmt: skip
_NETWORKS = ("httpx", "httpcore", "huggingface_hub")
"""Libraries whose errors of the network are no OSError."""


def machine_failure(error: BaseException) -> tuple[str, str] | None:
    """What the machine lacks, whosever code was running: memory, processes, files, a GPU that works. None if it is not that."""
    if isinstance(error, MemoryError):
        return "out of memory", _LESS_MEMORY
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{_file_of(error)}no room is left", "make room"
    return _first(_MACHINE, describe_error(error))


def known_failure(error: BaseException) -> tuple[str, str] | None:
    """What an error means and what to do about it; None where it is not known."""
    line = describe_error(error)
    network = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORKS
    found = _missing_module(line) or machine_failure(error) or _misfit(line) or _first(_FILES, line)
    if found is None and network:
        found = _first(_NETWORK, line)
    if found is None and isinstance(error, OSError) and error.filename and error.strerror:
        return f"{_file_of(error)}{error.strerror}", "the file must be there, and you must have the right to use it"
    return found


def _first(patterns: tuple[tuple[str, str, str], ...], line: str) -> tuple[str, str] | None:
    for pattern, what, hint in patterns:
        if found := re.search(pattern, line):
            name = next((value for value in found.groups() if value), "")
            size = re.search(r"allocate ([\d.]+ ?[KMGT]?i?[Bb](?:ytes)?)", line) if what == "out of memory" else None
            return what.format(name=name.strip()) + (f": {size[1]} more were asked for" if size else ""), hint
    return None


def _file_of(error: OSError) -> str:
    name = error.filename
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return f"{text}: " if name is not None else ""


def _misfit(line: str) -> tuple[str, str] | None:
    """Weights that are another model's: the first name of each kind that does not fit, and how many there are."""
    if "loading state_dict" not in line:
        return None
    parts = []
    for words, kind in (("Missing", "are missing"), ("Unexpected", "are not the model's")):
        if found := re.search(rf"{words} key\(s\) in state_dict: ((?:\"[^\"]*\"(?:, )?)+)", line):
            names = re.findall(r"\"([^\"]*)\"", found[1])
            parts.append(f"{len(names)} of them {kind}, the first of which is {names[0]!r}")
    if sizes := re.findall(r"size mismatch for (\S+):", line):
        parts.append(f"{len(sizes)} have another shape, the first of which is {sizes[0]!r}")
    return (
        f"the weights do not fit the model: {'; '.join(parts) or 'their names differ'}",
        "give the weights of this model",
    )


def _missing_module(line: str) -> tuple[str, str] | None:
    if not line.startswith("ModuleNotFoundError"):
        return None
    found = re.search(r"'([\w.]+)'", line)
    name = found[1] if found else "?"
    return f"the module {name!r} is not installed", "install the package that brings it"
