"""How long `mulki list` takes with many packages installed: python tools/bench_list.py [PACKAGES] [REPEATS]

Writes that many packages into a folder (each a distribution with metadata, a module with a hook that registers a plugin, a stream
and a folder with a strategy), puts it on the path, and takes the time of whole processes. Prints, in seconds,
without and with them, the median and the least on the clock, and the least of the processor, which a busy machine moves less.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOOKS = """\
from pathlib import Path
from mulki_plugins import hookimpl

@hookimpl
def mulki_register(register):
    register.plugin("{name}", "{module}.stage:Stage", summary="a stage", requires=["teachers"])
    register.stream("{name}", "{module}.stage:stream", summary="a stream", tasks=["one", "two"])
    register.folder("strategies", Path(__file__).parent / "strategies")
"""


def write(site: Path, count: int) -> None:
    """The packages."""
    for i in range(count):
        name, module = f"bench-{i}", f"bench_{i}"
        strategies = site / module / "strategies"
        strategies.mkdir(parents=True)
        (site / module / "__init__.py").write_text("")
        (site / module / "hooks.py").write_text(HOOKS.format(name=name, module=module))
        (strategies / f"{name}.yaml").write_text(f"name: {name}\nsummary: one of many\nplugins: [teachers, {name}]\n")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: one of many\nRequires-Dist: mulki>=0.1\n\n"
        (info / "METADATA").write_text(head + "A long description.\n" * 100)
        (info / "entry_points.txt").write_text(f"[mulki]\n{name} = {module}.hooks\n")


def seconds(path: list[str], repeats: int) -> tuple[list[float], list[float]]:
    """Of `mulki list`, by the clock and of the processor, each sorted; the first one, which compiles, is not counted."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    clock, processor = [], []
    for _ in range(repeats + 1):
        began, used = time.perf_counter(), _used()
        command = [sys.executable, "-m", "mulki_plugins", "list"]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        clock.append(time.perf_counter() - began)
        processor.append(_used() - used)
    return sorted(clock[1:]), sorted(processor[1:])


def _used() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="?", type=int, default=50)
    parser.add_argument("repeats", nargs="?", type=int, default=9)
    options = parser.parse_args()
    count, repeats = options.packages, options.repeats
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), count)
        for what, path in (("0", []), (str(count), [folder])):
            clock, processor = seconds(path, repeats)
            by_clock = f"median {statistics.median(clock):.2f}, least {clock[0]:.2f}"
            print(f"{what:>4} packages: {by_clock}; of the processor {processor[0]:.2f}")


if __name__ == "__main__":
    main()
