"""Builds the C++ runtime's own tests with sanitizers and runs them: ``python sanitize.py [address|thread]``.

What needs no Python is compiled into one program with the tests beside this file: with AddressSanitizer and
UndefinedBehaviorSanitizer, then with ThreadSanitizer. torch's libraries are as they came, without.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "sanitize"
RUNTIME = [
    "execution/program", "oversight/segment", "oversight/watch", "oversight/whereabouts",
    "transport/confirmation", "transport/doorbell", "transport/message", "transport/shared_memory",
]  # fmt: skip
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1",
    "LSAN_OPTIONS": f"suppressions={HERE / 'leaks.txt'}:print_suppressions=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "OMP_NUM_THREADS": "1",
}
# -Wno-...: what gcc's sanitizers make of torch's headers.
FLAGS = [
    "-std=c++20",
    "-DAT_PER_OPERATOR_HEADERS",
    "-DPP_RUNTIME_WITHOUT_PYTHON",
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-maybe-uninitialized",
    "-Wno-tsan",
]


def main() -> int:
    wanted = sys.argv[1:] or list(SANITIZERS)
    for name in wanted:
        program = build(name)
        print(f"sanitize: running with {name}", flush=True)
        finished = subprocess.run([program], env=os.environ | OPTIONS, timeout=300, check=False)
        if finished.returncode != 0:
            print(f"sanitize: FAILED with {name}: exit status {finished.returncode}")
            return 1
    print("sanitize: passed with " + " and ".join(wanted))
    return 0


def build(name: str) -> Path:
    """The test program with this sanitizer; files that have not changed are not compiled again."""
    folder = BUILD / name
    sources = [ROOT / "csrc" / f"{source}.cpp" for source in RUNTIME] + sorted(HERE.glob("*.cpp"))
    begin = time.monotonic()
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        objects = list(pool.map(lambda source: compile_source(source, folder, SANITIZERS[name]), sources))
    program = folder / "native_tests"
    libraries = cpp_extension.library_paths()
    link = ["g++", *SANITIZERS[name], *map(str, objects), "-o", str(program)]
    for library in libraries:
        link += [f"-L{library}", f"-Wl,-rpath,{library}"]
    subprocess.run([*link, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-pthread"], check=True)
    print(f"sanitize: built with {name} in {time.monotonic() - begin:.0f} s", flush=True)
    return program


def compile_source(source: Path, folder: Path, sanitizer: list[str]) -> Path:
    target = folder / source.relative_to(ROOT).with_suffix(".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    made_from = target.with_suffix(".d")
    if target.exists() and made_from.exists():
        inputs = made_from.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        if all(Path(path).exists() and Path(path).stat().st_mtime <= target.stat().st_mtime for path in inputs):
            return target
    includes = [f"-I{ROOT / 'csrc'}", f"-I{HERE}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    command = [
        "g++",
        *FLAGS,
        *sanitizer,
        *includes,
        "-MMD",
        "-MF",
        str(made_from),
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True)
    return target


if __name__ == "__main__":
    sys.exit(main())
