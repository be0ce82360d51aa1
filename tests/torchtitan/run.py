"""torchtitan, pytorch's reference trainer, on pp_runtime: are losses and gradient norms those of one rank?

    python tests/torchtitan/run.py                       both versions, about twenty minutes on two cores
    python tests/torchtitan/run.py --version 0.3.0 --only "pp 2, " --only "fsdp"
    python tests/torchtitan/run.py --version 0.3.0 --graph-pp    its GraphPP's own tests
    python tests/torchtitan/run.py --runtime torch       the same with torch.distributed.pipelining

The published wheel is installed into a virtual environment of its own (``--venv``, by default under
~/.cache/pp_runtime) beside torch 2.13.0 for the CPU, and triton, which torchtitan imports. A copy of the package
imports ``pp_runtime`` wherever it imported ``torch.distributed.pipelining``; nothing else in it is changed. The
checkout that this file is in must be built for Python 3.11 and torch 2.13.0 (``make build``).

The model is torchtitan's llama3 debugmodel in float32 (6 layers of width 256), on 8 rows of 64 random tokens a step,
over gloo. cpu.py stands for an accelerator, gives rows that depend on the step and the row only, and parameters that
depend on their name only; so every layout trains the same model on the same data. Numbers are equal within a relative
1e-4: the order of sums differs, by microbatch, stage and shard. A resumed run must repeat the last step of the
uninterrupted one to the last bit.

Where a stage is on several ranks, 0.3.0 runs with ``partial_dtensor`` or ``full_dtensor``: its default, ``spmd_types``,
makes plain parameters that FSDP of torch 2.13 refuses. With ``--runtime torch`` only 0.2.2 runs, since 0.3.0 passes
microbatches to ``step`` that torch 2.13's does not take.

torchtitan 0.2.2 divides the loss by the number of tokens before the backward without a pipeline, and after it with
one, so that a pipeline's gradients are larger by the number of tokens in the batch, under torch's pipelining too. Its
norm is then compared with one rank's times that number. Both are above the norm of 1 at which torchtitan clips, so the
updates are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from matrix import TOKENS, Run, runs

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pp_runtime"
_NEWER_TORCH = "test_multiplexed_graph_copies_backward_meta_to_forward_fake_mode"
TORCH, TOLERANCE, DEADLINE = "2.13.0", 1e-4, 600


def main() -> int:
    options = _options()
    failed = 0
    for version in options.version or ("0.3.0", "0.2.2"):
        python = install(version, options.venv)
        with tempfile.TemporaryDirectory(prefix="torchtitan-") as folder:
            work = Path(folder)
            environment = copy_package(python, work, options.runtime)
            if options.graph_pp:
                failed += graph_pp_tests(python, work, environment)
                continue
            chosen = [run for run in runs(version) if run.ranks == 1 or _wanted(run, options.only)]
            results = train_all(chosen, python, version, work, environment)
        failed += report(chosen, results, version, options.runtime)
    return 1 if failed else 0


def install(version: str, venv: Path | None) -> Path:
    """A virtual environment with torchtitan; its Python."""
    home = venv or CACHE / f"torchtitan-{version}-torch-{TORCH}"
    python = home / "bin" / "python"
    if not (home / "made").exists():
        subprocess.run([_python_3_11(), "-m", "venv", home], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={TORCH}", f"torchtitan=={version}", "triton", "pytest"], check=True)
        (home / "made").touch()
    return python


def copy_package(python: Path, work: Path, runtime: str) -> dict[str, str]:
    """Copy torchtitan with its imports of torch's pipelining replaced; the environment in which it is found."""
    where = "import importlib.util as u; print(u.find_spec('torchtitan').submodule_search_locations[0])"
    source = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True, cwd=work).stdout.strip()
    package = work / "package" / "torchtitan"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    if runtime == "pp_runtime":
        for file in package.rglob("*.py"):
            text = file.read_text()
            if "torch.distributed.pipelining" in text:
                file.write_text(text.replace("torch.distributed.pipelining", "pp_runtime"))
    paths = os.pathsep.join(map(str, (package.parent, CHECKOUT, HERE)))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PP_RUNTIME_DEADLINE": "120"}


def train_all(
    chosen: list[Run], python: Path, version: str, work: Path, environment: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Results by the runs' names. Runs of as many ranks share their processes, until one fails."""
    results: dict[str, dict[str, Any]] = {}
    by_ranks: dict[int, list[Run]] = defaultdict(list)
    for run in chosen:
        by_ranks[run.ranks].append(run)
    for ranks, rest in by_ranks.items():
        while rest:
            found = _train_some(rest, ranks, python, version, work, environment)
            first = rest[0].name
            results.update(found or {first: {"error": f"no result; see {work}"}})
            rest = [run for run in rest if run.name not in results]
            if "error" in results.get("one rank", {}):
                raise SystemExit(f"one rank does not train, so there is nothing to compare: {results['one rank']}")
    return results


def _train_some(
    some: list[Run], ranks: int, python: Path, version: str, work: Path, environment: dict[str, str]
) -> dict[str, dict[str, Any]]:
    (work / "plan.json").write_text(json.dumps([dataclasses.asdict(run) for run in some]))
    (work / "results.jsonl").unlink(missing_ok=True)
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launch, HERE / "train.py", work, version]
    with (work / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=work, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(DEADLINE + 10 * len(some))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: dict[str, dict[str, Any]] = {}
    results = work / "results.jsonl"
    for line in results.read_text().splitlines() if results.exists() else ():
        result = json.loads(line)
        found.setdefault(result["name"], result)
    if process.returncode:
        unfinished = next((run.name for run in some if run.name not in found), None)
        if unfinished is not None and not any("error" in result for result in found.values()):
            found[unfinished] = {"error": f"ended with {process.returncode}"}
        sys.stderr.write((work / "log").read_text()[-4000:])
    return found


def report(chosen: list[Run], results: dict[str, dict[str, Any]], version: str, runtime: str) -> int:
    """Print a line for each run; how many are not equal."""
    print(f"\ntorchtitan {version}, torch {TORCH}, {runtime}: loss / gradient norm of each step")
    failed = 0
    one_rank = results.get("one rank", {})
    for run in chosen:
        result = results[run.name]
        if "error" in result:
            verdict = "failed: " + result["error"]
        else:
            verdict = _verdict(run, result, one_rank, results, version)
        failed += not verdict.startswith("equal")
        steps = "  ".join(f"{loss:.5f} / {norm:.5g}" for _, loss, norm in result.get("logged", ()))
        print(f"{run.name:<46} {steps:<60} {verdict:<24} {result.get('seconds', 0):5.1f} s", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} equal")
    return failed


def _verdict(
    run: Run, result: dict[str, Any], one_rank: dict[str, Any], results: dict[str, dict[str, Any]], version: str
) -> str:
    logged = {step: (loss, norm) for step, loss, norm in result["logged"]}
    if run.checkpoint == "resumed":
        saved = results.get(run.name.replace("resumed", "saved"), {}).get("logged", ())
        uninterrupted = {step: (loss, norm) for step, loss, norm in saved if step > 2}
        return "equal, every bit" if logged == uninterrupted != {} else f"DIFFERS from {uninterrupted}"
    worst = 0.0
    for step, loss, norm in one_rank.get("logged", ()):
        if run.pipeline_parallel > 1 and version.startswith("0.2"):
            norm *= TOKENS
        for mine, theirs in zip(logged.get(step, (float("nan"),) * 2), (loss, norm), strict=True):
            difference = abs(mine - theirs) / abs(theirs)
            worst = difference if not difference <= worst else worst
    return f"equal ({worst:.0e})" if worst <= TOLERANCE and logged else f"DIFFERS by {worst:.2e}"


def graph_pp_tests(python: Path, work: Path, environment: dict[str, str]) -> int:
    """Run the tests of GraphPP's runner that are in the wheel of 0.3.0; one reads what torch 2.13's ShapeEnv lacks."""
    tests = work / "package/torchtitan/experiments/graph_trainer/tests/test_graph_pp_runner.py"
    command = [python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", tests, "-k", f"not {_NEWER_TORCH}"]
    return subprocess.run(command, env=environment, cwd=work).returncode


def _wanted(run: Run, only: list[str] | None) -> bool:
    return not only or any(part in run.name for part in only)


def _python_3_11() -> str:
    return shutil.which("python3.11") or sys.executable


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action="append", help="of torchtitan: 0.3.0 or 0.2.2; both, unless given")
    parser.add_argument("--venv", type=Path, help="a virtual environment that has or gets torch and torchtitan")
    parser.add_argument("--runtime", choices=("pp_runtime", "torch"), default="pp_runtime")
    parser.add_argument("--only", action="append", help="runs with this in their name, and those of one rank")
    parser.add_argument("--graph-pp", action="store_true", help="run the tests of GraphPP's runner instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
