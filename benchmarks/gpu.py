"""python benchmarks/gpu.py --out DIR: everything that dgfast has to say about a CUDA machine, within ten minutes.

Needs no network. Every part runs in a process of its own, so that one that fails, hangs or crashes leaves the others
alone. After every part it writes DIR/table.md and DIR/results.json: a pytest-benchmark file, which
python -m benchmarks.report reads, with how every part ended and what it found under "parts".
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

_REPOSITORY = Path(__file__).resolve().parents[1]
_PYTEST = ("-m", "pytest", "-q", "-rfEs", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider")
_TAIL = 3000  # characters of a failed part's output that are kept
_KERNEL_TESTS = tuple(f"tests/kernels/test_{name}.py" for name in ("references", "switch", "group_norm"))
GRACE = 15.0  # seconds that an interrupted part has to write what it knows
LEAST = 10.0  # a part does not begin with less time than this

OUT_OF_TIME = "not run: out of time"


@dataclass(frozen=True)
class Part:
    """One process: arguments of python, in which {json} is the file for its result and {out} the folder.

    Attributes:
        kind: "tests" and "benchmarks" are pytest runs, the latter with a pytest-benchmark file as their result; a
            "part" prints its table.
    """

    name: str
    kind: Literal["part", "tests", "benchmarks"]
    arguments: tuple[str, ...]


def parts(device: str, small: bool) -> list[Part]:
    """The parts, in the order of interest: if the time does not suffice, the last are missing."""
    workload, others = ("tiny", ()) if small else ("edm-cifar10", ("mnist32",))
    most, middle, few = ("2", "2", "2") if small else ("512", "64", "8")
    # Without a GPU there is nothing to learn from compiling, and a dry run must be short.
    runtime = ("--runtime", "eager") if small else ()
    tiny = ("--workload", "tiny", *runtime) if small else ()
    rounds = ("--seconds", "0") if small else ()

    def own(name: str, part: str, *options: str) -> Part:
        return Part(name, "part", ("-m", "benchmarks.parts", part, "--device", device, "--out", "{json}", *options))

    def bench(name: str, files: str, *options: str) -> Part:
        paths = [f"benchmarks/bench_{file}.py" for file in files.split()]
        usual = ("--benchmark-only", "--benchmark-json", "{json}", "--device", device, "--until", "{until}", *rounds)
        return Part(name, "benchmarks", (*_PYTEST, *paths, *usual, *options))

    def run(name: str, precisions: str, batches: str, *options: str, but: str = "unguided") -> Part:
        """Guided steps and samplers, beside which unguided ones run anyway, but for those measured already."""
        chosen = (*_repeated("--precision", precisions), *_repeated("--batch", batches), *options)
        left_out = ("-k", f"not unguided and not {but}")
        return bench(name, "guided_step sampler", *left_out, "--workload", workload, *chosen)

    def parity(name: str) -> Part:
        options = ("--workload", name, "--batch", few, *_repeated("--precision", "float32 bf16"), *runtime)
        return own(f"parity, {name}", "parity", *options)

    sizes = (*_repeated("--batch", "2" if small else "1 64 512"), *_repeated("--precision", "float32 fp16"))
    engines = ("-m", "benchmarks.engines", "--device", device, "--out", "{json}", "--workload", workload, *sizes)
    beside = (*_repeated("--batch", "1 8 32 64"), "--precision", "bf16")
    profiled = ("--workload", workload, "--batch", most, "--precision", "bf16", "--trace", "{out}/trace.json.gz")
    return [
        own("environment", "environment", *rounds),
        Part("kernel tests", "tests", (*_PYTEST, *_KERNEL_TESTS, *(("-k", "reference") if small else ()))),
        run("throughput", "bf16 default", most, *runtime),
        *([] if small else [run("latency", "float32 bf16", "1", *runtime)]),  # as above, with other numbers
        *(parity(name) for name in (*others, workload)),
        Part("engines", "part", engines),
        *([] if small else [own("streams", "streams", "--workload", workload, *beside)]),
        bench("kernels", "kernels", *tiny),
        own("profile", "profile", *profiled, *runtime),
        run("the rest", "tf32" if small else "float32 tf32 bf16", f"{most} {middle}", *runtime, but=f"{most}-bf16"),
    ]


def _repeated(option: str, values: str) -> tuple[str, ...]:
    return tuple(word for value in dict.fromkeys(values.split()) for word in (option, value))


@click.command(help=__doc__)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=10, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="Try the script itself: tiny sizes that say nothing about speed.")
def main(out: Path, minutes: float, device: str, small: bool) -> None:
    deadline = time.time() + 60 * minutes - GRACE
    if device.startswith("cuda") and not _cuda_works():
        click.echo("Error: no CUDA device here; to try the script itself, use --device cpu --small", err=True)
        sys.exit(2)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"benchmarks": [], "parts": {}}
    benchmark_tables = ""
    for part in parts(device, small):
        click.echo(f"{part.name} ... ", nl=False)
        record, measured = _run(part, out, deadline)
        results["parts"][part.name] = record
        results = measured | results | {"benchmarks": results["benchmarks"] + measured.get("benchmarks", [])}
        _write(out / "results.json", json.dumps(results, indent=1))
        if measured:
            benchmark_tables = _benchmark_tables(out / "results.json")
        _write(out / "table.md", _tables(results["parts"]) + benchmark_tables)
        click.echo(f"{record['status']} ({record['seconds']:.0f} s)")
    sys.exit(any(record["status"].startswith("failed") for record in results["parts"].values()))


def _cuda_works() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(part: Part, out: Path, deadline: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the part ended and what it found, and its pytest-benchmark file if it made one."""
    began = time.time()
    if deadline - began < LEAST:
        return {"status": OUT_OF_TIME, "seconds": 0.0}, {}
    with tempfile.TemporaryDirectory() as folder:
        path, log, errors = (Path(folder, name) for name in ("result.json", "log", "errors"))
        arguments = [word.format(json=path, out=out.resolve(), until=deadline) for word in part.arguments]
        # The tests ask for deterministic algorithms, for which cuBLAS wants this; no speed is measured with it.
        extra = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if part.kind == "tests" else {}
        with log.open("w") as stdout, errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=_REPOSITORY, env=os.environ | extra, stdout=stdout, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
            status = _finish(process, deadline)
        printed, complaints = (file.read_text(errors="replace") for file in (log, errors))
        found = json.loads(path.read_text()) if path.is_file() and path.stat().st_size else {}
    record = {"status": status, "seconds": time.time() - began, "command": " ".join(["python", *arguments])}
    if status != "ok":
        record["output"] = (printed + complaints)[-_TAIL:]
    if part.kind == "part":
        return record | {"found": found, "table": printed if found else ""}, {}
    return record | {"summary": _summary(printed)}, found


def _finish(process: subprocess.Popen[bytes], deadline: float) -> str:
    """Wait for the process; at the deadline interrupt it, so that it can still write its results, then end it."""
    try:
        code = process.wait(max(deadline - time.time(), 0))
        return "ok" if code == 0 else f"failed: exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return "stopped: out of time"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _summary(printed: str) -> list[str]:
    """What pytest says of every test that did not pass, and its last line."""
    lines = [line for line in printed.splitlines() if line.strip()]
    return [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))] + lines[-1:]


def _tables(records: dict[str, dict[str, Any]]) -> str:
    rows = ["| part | how it ended | seconds |", "| --- | --- | --- |"]
    rows += [f"| {name} | {record['status']} | {record['seconds']:.0f} |" for name, record in records.items()]
    texts = ["\n".join(rows)]
    for name, record in records.items():
        lines = [f"    {line}" for line in record.get("summary", [])] or record.get("table", "").splitlines()
        if lines:
            texts.append("\n".join([f"## {name}", "", *lines]))
    return "\n\n".join(texts) + "\n\n"


def _benchmark_tables(results: Path) -> str:
    command = [sys.executable, "-m", "benchmarks.report", str(results.resolve())]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout or done.stderr


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
