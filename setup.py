"""Builds the C++ runtime, `pp_runtime._C`, against the torch that is installed beside it.

A CUDA build is made when torch has CUDA and a toolkit is found, a CPU build otherwise.
`PP_RUNTIME_CUDA=0` and `PP_RUNTIME_CUDA=1` force either; `MAX_JOBS` bounds the compilers that run at once.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

try:
    import torch
except ImportError as error:
    raise SystemExit(
        "pp_runtime compiles against the torch that is installed, and none is. Install torch 2.11 to 2.14 with "
        "setuptools and ninja first, then run pip with --no-build-isolation."
    ) from error

ROOT = Path(__file__).resolve().parent
PACKAGE = "pp_runtime"


def toolkit_folder() -> Path | None:
    """The CUDA toolkit's folder: `CUDA_HOME`, else what the nvcc on the PATH says of itself, else the usual place."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name])
    try:
        # nvcc may be a wrapper that stands far from its toolkit, so its own path tells nothing.
        said = subprocess.run(
            ["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
        )
        tops = [line.removeprefix("#$ TOP=") for line in said.stderr.splitlines() if line.startswith("#$ TOP=")]
        if tops:
            return Path(tops[0]).resolve()
    except FileNotFoundError:
        pass
    usual = Path("/usr/local/cuda")
    return usual if usual.exists() else None


def wants_cuda(toolkit: Path | None) -> bool:
    """Whether to make a CUDA build; a forced one that cannot be made is an error that says what is missing."""
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} has no CUDA")
    if toolkit is None or not (toolkit / "include" / "cuda_runtime_api.h").exists():
        missing.append("no CUDA toolkit was found (CUDA_HOME names none and no nvcc is on the PATH)")
    forced = os.environ.get("PP_RUNTIME_CUDA", "")
    if forced not in ("", "0", "1"):
        raise SystemExit(f"PP_RUNTIME_CUDA is {forced!r}; it is 0 for a CPU build, 1 for a CUDA build, or unset.")
    if forced == "1" and missing:
        raise SystemExit("PP_RUNTIME_CUDA=1 asks for a CUDA build, but " + " and ".join(missing) + ".")
    return forced != "0" and not missing


TOOLKIT = toolkit_folder()
CUDA = wants_cuda(TOOLKIT)
if CUDA:
    os.environ["CUDA_HOME"] = str(TOOLKIT)  # torch reads it when cpp_extension is imported
os.environ.setdefault("MAX_JOBS", "2")  # one file with torch's headers takes more than a gigabyte to compile

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler  # noqa: E402


def sources() -> list[str]:
    """The C++ files of the build: those of `csrc/cuda` only where there is CUDA, no room's bindings.cpp.

    csrc/bindings.cpp includes those.
    """
    found = sorted((ROOT / "csrc").rglob("*.cpp"))
    if CUDA:
        found += sorted((ROOT / "csrc").rglob("*.cu"))
    kept = [path for path in found if CUDA or (ROOT / "csrc" / "cuda") not in path.parents]
    rooms_bindings = set((ROOT / "csrc").glob("*/bindings.cpp"))
    return [str(path.relative_to(ROOT)) for path in kept if path not in rooms_bindings]


def wheel_includes() -> list[str]:
    """Headers of the CUDA libraries that came as wheels with torch; a toolkit may lack them."""
    nvidia = Path(torch.__file__).resolve().parent.parent / "nvidia"
    return [str(path) for path in sorted(nvidia.glob("*/include"))]


def extension() -> Any:
    """`pp_runtime._C`, with warnings as errors in our files and none in torch's headers."""
    warnings = ["-Wall", "-Wextra", "-Werror"]
    # CFLAGS come before these on the command line, so what they say of -O and -g would be overruled.
    ours = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3", "-g1"]
    # AT_PER_OPERATOR_HEADERS: torch's headers include the operators that they use, not all of them.
    flags = ["-std=c++20", "-DAT_PER_OPERATOR_HEADERS", f"-DPP_RUNTIME_CUDA={int(CUDA)}"]
    extension_class = CUDAExtension if CUDA else CppExtension
    made = extension_class(f"{PACKAGE}._C", sources(), language="c++")
    systems = list(made.include_dirs) + (wheel_includes() if CUDA else []) + [sysconfig.get_paths()["include"]]
    made.include_dirs = [str(ROOT / "csrc")]
    system_flags = [f"-isystem{folder}" for folder in systems]
    made.extra_compile_args = {
        "cxx": [*flags, *ours, "-fvisibility=hidden", *warnings, *system_flags],
        "nvcc": [*flags, *system_flags],
    }
    made.depends = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]
    return made


class Build(BuildExtension):
    """Compiles, then writes beside the library which torch it was built for; the import compares."""

    def build_extension(self, extension: Any) -> None:
        extension.include_dirs.insert(0, str(self.precompiled(extension.extra_compile_args["cxx"])))
        super().build_extension(extension)

    def precompiled(self, flags: list[str]) -> Path:
        """The folder of csrc/precompiled.h as the compiler keeps it, made where it is not there.

        Its name tells what it was made by and from, so another torch, compiler or flag makes another one, and compiles
        all anew. A compiler that finds none that it can use takes csrc/precompiled.h itself, and longer.
        """
        header = ROOT / "csrc" / "precompiled.h"
        compiler = shlex.split(get_cxx_compiler())
        command = [*compiler, *self.compiler.compiler_so[1:], *flags, "-x", "c++-header", str(header)]
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
        made_from = [*command, version, torch.__version__, torch.__file__, header.read_text()]
        name = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:12]
        folder = (Path(self.build_temp) / f"precompiled-{name}").resolve()
        target = folder / "precompiled.h.gch"
        if not target.exists():
            for other in folder.parent.glob("precompiled-*"):  # each takes hundreds of megabytes
                shutil.rmtree(other)
            folder.mkdir(parents=True)
            unfinished = target.with_suffix(".unfinished")
            if subprocess.run([*command, "-o", str(unfinished)], check=False).returncode == 0:
                unfinished.rename(target)
        return folder

    def copy_extensions_to_source(self) -> None:
        # A process that runs has the old library mapped: it keeps the file it has, and the new one takes its name.
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def run(self) -> None:
        compiler = shlex.split(get_cxx_compiler())[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"pp_runtime is compiled, and there is no C++ compiler: {compiler!r} is not on the PATH. Install g++ "
                "(Debian, Ubuntu: apt install g++), or name another compiler in CXX."
            )
        super().run()
        folder = ROOT / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        text = (
            '"""Written by setup.py: what the extension was built for."""\n\n'
            f'TORCH_VERSION = "{torch.__version__}"\nCUDA = {CUDA}\n'
        )
        if self.inplace:
            self.run_command("egg_info")  # by which torch.compile finds the backend in a checkout
        target = folder / "_build_info.py"
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


setup(
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={PACKAGE: ["py.typed", "*.pyi"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": Build},
)
