"""Explains known failures of libraries and of the machine: what an error means, and what to do next."""

from __future__ import annotations

import errno
import re

from mulki_plugins.errors import describe_error

Rule = tuple[str, str, str]
"""A regular expression for an error's type and text, what the error means, and what to do. `{name}` is the first group."""

_FEWER_WORKERS = "lower train.workers, or set it to 0"
_LESS_MEMORY = (
    "try a smaller train.batch_size (or evaluate.batch_size), train.accumulate=2, train.precision=bf16, "
    "or model.train=image"
)

_MACHINE: tuple[Rule, ...] = (
    (
        r"DataLoader worker.*[Bb]us error|unable to (?:open|allocate|write|mmap|resize).*(?:shared memory|torch_|shm)",
        "the processes' shared memory (/dev/shm) is full",
        "allow more, for example by `docker run --shm-size=8g`, or set train.workers=0",
    ),
    (
        r"DataLoader worker.*killed by signal: ([\w ]+)",
        "a loader's worker process was ended by the signal {name}", f"it may have run out of memory: {_FEWER_WORKERS}",
    ),
    (
        r"DataLoader worker",
        "a loader's worker process ended", f"it may have run out of memory: {_FEWER_WORKERS}",
    ),
    (
        r"Too many open files|received \d+ items of ancdata",
        "too many files are open at once", f"raise the limit, for example by `ulimit -n 65536`, or {_FEWER_WORKERS}",
    ),
    (
        r"can't start new thread|Resource temporarily unavailable",
        "no further process or thread can be started", f"raise the limit (`ulimit -u`), or {_FEWER_WORKERS}",
    ),
    (
        r"out of memory|can't allocate memory|Cannot allocate memory|DefaultCPUAllocator|Unable to allocate",
        "out of memory", _LESS_MEMORY,
    ),
    (
        r"no kernel image is available|not compatible with the current PyTorch",
        "torch was not built for this GPU", "install the build of torch that was, or set device=cpu",
    ),
    (
        r"driver version is insufficient|NVIDIA driver on your system is too old|no NVIDIA driver",
        "the GPU's driver is missing or too old for this torch", "update the driver, or set device=cpu",
    ),
    (
        r"device-side assert",
        "a computation on the GPU failed, often because a class or an index is out of range",
        "run it with device=cpu to see where",
    ),
    (
        r"(CUBLAS_STATUS_\w+|CUDNN_STATUS_\w+|cuDNN error)",
        "a library of the GPU failed ({name})", f"it may be out of memory: {_LESS_MEMORY}; or set device=cpu",
    ),
    (
        r"(?:CUDA|HIP) error: ([^\n.]+)",
        "the GPU failed: {name}",
        "continue with `mulki resume`; if it fails again, check the GPU, or set device=cpu",
    ),
    (
        r"not implemented for '(Half|BFloat16)'",
        "this device cannot compute with {name} numbers", "set train.precision=fp32",
    ),
)  # fmt: skip
"""The first rule that matches counts, here and below."""

_FILES: tuple[Rule, ...] = (
    (
        r"[Cc]an(?:'|no)t pickle|Can't get local object",
        "an object cannot be passed to a loader's worker process", "set train.workers=0",
    ),
    (
        r"[Ww]eights.only|WeightsUnpickler|Unsupported global",
        "the file of weights contains more than tensors, such as code, which is not loaded",
        "save only the model's state_dict, preferably as safetensors",
    ),
    (
        r"PytorchStreamReader|archive is corrupted|corrupt file|magic number|"
        r"HeaderTooLarge|InvalidHeader|HeaderTooSmall|IncompleteBuffer",
        "the file of weights is damaged, or is not a file of weights", "download or copy the file again",
    ),
    (r"PytorchStreamWriter", "a file cannot be written", "free some disk space"),
)  # fmt: skip

_NETWORK: tuple[Rule, ...] = (
    (
        r"CERTIFICATE_VERIFY_FAILED|certificate verify failed",
        "the server's certificate cannot be verified",
        "if a proxy stands in between, set SSL_CERT_FILE to the file of its certificate",
    ),
    (
        r"[Nn]ame resolution|Name or service not known|getaddrinfo failed|Network is unreachable|Max retries exceeded|"
        r"Connection refused|timed out|No route to host",
        "the server cannot be reached", "check the network, or give a local file",
    ),
    (
        r"HTTP Error (\d{3})|(\d{3}) Client Error",
        "the server answered with error {name}", "try again later, or download the file by hand",
    ),
)  # fmt: skip
_NETWORK_LIBRARIES = ("httpx", "httpcore", "huggingface_hub")
"""Libraries whose network errors are not OSErrors."""


def explain_machine_failure(error: BaseException) -> tuple[str, str] | None:
    """What the machine lacks (memory, processes, files, a working GPU), whichever code ran, and what to do; else None."""
    if isinstance(error, MemoryError):
        return "out of memory", _LESS_MEMORY
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{_file_of(error)}no room is left", "free some disk space"
    return _match(_MACHINE, describe_error(error))


def explain_failure(error: BaseException) -> tuple[str, str] | None:
    """What a known error means and what to do; None for an unknown one."""
    line = describe_error(error)
    network = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_LIBRARIES
    explained = (
        _explain_missing_module(line)
        or explain_machine_failure(error)
        or _explain_misfit(line)
        or _match(_FILES, line)
        or (_match(_NETWORK, line) if network else None)
    )
    if explained is None and isinstance(error, OSError) and error.filename and error.strerror:
        return f"{_file_of(error)}{error.strerror}", "the file must be there, and you must have permission to use it"
    return explained


def _match(rules: tuple[Rule, ...], line: str) -> tuple[str, str] | None:
    for pattern, what, hint in rules:
        if match := re.search(pattern, line):
            name = next((group for group in match.groups() if group), "")
            size = re.search(r"allocate ([\d.]+ ?[KMGT]?i?[Bb](?:ytes)?)", line) if what == "out of memory" else None
            return what.format(name=name.strip()) + (f": another {size[1]} were needed" if size else ""), hint
    return None


def _file_of(error: OSError) -> str:
    name = error.filename
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return f"{text}: " if name is not None else ""


def _explain_misfit(line: str) -> tuple[str, str] | None:
    """Weights of another model: for each kind of mismatch their number and the first name."""
    if "loading state_dict" not in line:
        return None
    parts = []
    for key, what in (("Missing", "missing"), ("Unexpected", "unknown to the model")):
        if match := re.search(rf"{key} key\(s\) in state_dict: ((?:\"[^\"]*\"(?:, )?)+)", line):
            names = re.findall(r"\"([^\"]*)\"", match[1])
            parts.append(f"{len(names)} {what}, such as {names[0]!r}")
    if names := re.findall(r"size mismatch for (\S+):", line):
        parts.append(f"{len(names)} of another shape, such as {names[0]!r}")
    mismatch = "; ".join(parts) or "their names differ"
    return f"the weights do not fit the model: {mismatch}", "give the weights of this model"


def _explain_missing_module(line: str) -> tuple[str, str] | None:
    if not line.startswith("ModuleNotFoundError"):
        return None
    match = re.search(r"'([\w.]+)'", line)
    return f"the module {match[1] if match else '?'!r} is not installed", "install its package"
