"""python -m tests.page_commands: all commands of the pages, as written and in order, in the environment a page makes.

Each page gets a fresh copy of the checkout and an empty home. Prints a row a command, and what failed printed last;
exits with 1 if anything failed. A command is left out only where its own comment says why, `# needs a GPU`; it may end
with another exit code than 0 only where its comment names that.

--short runs in the current virtual environment, of which a page sees only the extras that it has installed by then, in
a Python that has imported torch already, and cuts commands down as the rows show; `--help` stands for checking that the
options exist. Without --short the page's own commands make the environment and nothing is cut down, which takes hours,
but what runs on a stand-in for somebody else's checkpoint: that draws two images.
"""

import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import click
from click.testing import CliRunner

from tests.support.page_environments import Shell
from tests.support.paths import ROOT

PAGES = tuple(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "docs/*.md", "dgfast/assets/*/README.md", "kernels/README.md")
    for path in sorted(ROOT.glob(pattern))
)
_NEEDS = {"a GPU": "nvidia-smi", "Slurm": "sbatch"}  # what a comment may ask for, and the program that comes with it
_ENVIRONMENT = "make .venv/.installed && . .venv/bin/activate"  # which README.md makes, and all others go on in
_BORROWED = r"--bundle (?:cifar10|adm-64|dit)\b"
# What a command becomes in the short form: the first pattern that it holds decides. {} is the command itself; without
# the discriminator a graph is half as large.
SHORT = (
    (r"^(draw=.*?) --compile(.*)$", r"\1\2"),
    (r"^draw=|benchmarks\.report benchmarks", "{}"),
    (r"^pytest benchmarks/", "{} --collect-only --quiet"),
    (r"^pytest (tests/.*)", r"ls \1"),
    (r"^make test$", "{} --dry-run"),
    (r"^make sample$", "$({} --dry-run | tail -1) --seeds 0-1 --steps 2 --dg-weight 0"),
    (r"64x64_diffusion|64x64_classifier|adm-64", "{} --help"),  # known by its full size alone, 1.2 GB
    (r"benchmarks\.report results\.json", "python -m benchmarks.report benchmarks/results/cpu-2-cores.json"),
    (r"--out (?:cold|warm)$|benchmarks[./]|to_trt|^dgfast evaluate", "{} --help"),
    (r"to_package", "{} --help"),
    (r"package_only|TORCH=", "ls examples/package_only.cpp"),
    (r"examples/observe\.py", "ls examples/observe.py"),
    (r"examples/(?:forces|guided_diffusers)", "ls examples"),  # tests/export/test_functions.py runs them
    (r"examples/onnx_only\.py (\S+) .*", r"ls examples/onnx_only.py \1"),  # tests/export/test_export.py runs it
    (r"export/to_onnx\.py .*--(?:batch|what step)|--engine", "{} --help"),
    (r"^dgfast report .*(?:\.json|--trajectory)", "{} --help"),
    (r"dgfast[ .]sample .*--one-step", "{} --seeds 0-15"),
    (r"dgfast[ .]sample .*--(?:compile|runtime)", "{} --seeds 0-1 --steps 2 --dg-weight 0"),
    (r"dgfast[ .]evaluate", "{} --holdout 8 --data few.npz"),
    (r"^\$draw", "{} --seeds 0-15 --steps 2"),
    (r"dgfast[ .]sample .*--out fakes", "{} --seeds 0-15 --steps 2"),
    (r"torchrun .* -m (dgfast\.sample .*)", r"python -m \1 --seeds 0-1 --steps 2"),  # tests/jobs/test_jobs.py runs it
    (r"dgfast[ .]sample", "{} --seeds 0-1 --steps 2"),
    (r"dgfast[ .]train", "{} --images 8 --batch 8 --holdout 8 --data few.npz"),
    (r"to_onnx.* --what step", "{} --dg-weight 0 --solver euler"),
    (r"kernels\.resources", "python -c 'import dgfast.kernels.resources'"),
)


@dataclass(frozen=True)
class Command:
    """A command of a page, or a whole block of Python, and the line where it stands; 0: what comes before the page."""

    page: str
    line: int
    text: str
    python: bool = False


@dataclass(frozen=True)
class Row:
    """What became of a command. outcome: "ok", "failed", or why it was not run."""

    command: Command
    ran: str
    outcome: str
    seconds: float
    printed: str = ""

    def __str__(self) -> str:
        ran = self.ran.replace("|", "\\|").replace("\n", " ")
        return f"| {self.command.page}:{self.command.line} | `{ran}` | {self.outcome} | {self.seconds:.1f} |"


def commands(page: str) -> Iterator[Command]:
    """The commands of a page, in order."""
    language, block, start, pending = "", list[str](), 0, ""
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        if line.startswith("```"):
            if language == "python":
                yield Command(page, start, "\n".join(block), python=True)
            language, block, start = ("" if language else line[3:].strip()), [], number + 1
        elif language == "python":
            block.append(line)
        elif language == "sh":
            pending += line.removesuffix("\\")
            if not line.endswith("\\") and _is_whole(pending):
                if shlex.split(pending, comments=True):
                    yield Command(page, number, pending)
                pending = ""
            elif not line.endswith("\\"):
                pending += "\n"


def _is_whole(text: str) -> bool:
    """Whether every quotation that begins ends."""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


def run(page: str, folder: Path, short: bool, most: float | None = None) -> Iterator[Row]:
    """Run a page's commands in a new folder, one after the other; a row for each. most: seconds that one may take."""
    shell = Shell(folder, stand_in=short)
    before = () if page == "README.md" else (Command(page, 0, _ENVIRONMENT),)
    for command in (*before, *commands(page)):
        text, _, comment = (command.text, "", "") if command.python else command.text.partition(" # ")
        lacking = [need for need, program in _NEEDS.items() if f"needs {need}" in comment and not shutil.which(program)]
        if lacking:
            yield Row(command, text.strip(), f"not run: needs {' and '.join(lacking)}", 0.0)
            continue
        text = _script(command, shell.home, short) if command.python else _as_run(text.strip(), short)
        borrowed = _stand_ins(text, shell.copy)
        began = time.perf_counter()
        if text.endswith(" --help"):
            status, printed = options_exist(text)
        else:
            status, printed = shell.run(text, most)
        seconds = time.perf_counter() - began
        yield Row(command, text, _outcome(status, comment, borrowed), seconds, printed)


def _outcome(status: int | None, comment: str, borrowed: str) -> str:
    if status is None:
        return "no error until it was ended"
    if status and f"exit code {status}" not in comment:
        return f"failed: {status}"
    return "ok" + (f", exit code {status}" if status else "") + (f", on a stand-in of {borrowed}" if borrowed else "")


def _as_run(text: str, short: bool) -> str:
    """What becomes of a command."""
    if not short:
        return f"{text} --seeds 0-1" if re.search(_BORROWED, text) else text
    for pattern, form in SHORT:
        match = re.search(pattern, text)
        if match:
            return match.expand(form).format(text)
    return text


def options_exist(text: str) -> tuple[int | None, str]:
    """Exit status and output of a command that ends with --help, without the seconds that a process takes to start."""
    program, *words = shlex.split(text)
    if program == "dgfast":
        module = "dgfast.__main__"
    elif words[0] == "-m":
        _, module, *words = words
    else:
        path, *words = words
        module = path.removesuffix(".py").replace("/", ".")
        module = module if module.startswith("benchmarks.") else f"dgfast.{module}"
    result = CliRunner().invoke(import_module(module).main, words)
    return result.exit_code, result.output


def _stand_ins(text: str, folder: Path) -> str:
    """Make what a command reads and nobody here has; its names."""
    from tests.support import stand_ins  # imports torch

    names = [name for name in stand_ins.NAMES if name in text and not text.endswith(" --help")]
    for name in names:
        stand_ins.make(name, folder)
    return " and ".join(names)


def _script(command: Command, home: Path, short: bool) -> str:
    """The command that runs a block of Python; in the short form for 2 images instead of 16."""
    text = re.sub(r"\b16\b", "2", command.text) if short else command.text
    (home / f"line_{command.line}.py").write_text(text + "\n")
    return f"python ~/line_{command.line}.py" + ("  # 2 for 16" if text != command.text else "")


@click.command(help=__doc__)
@click.argument("pages", nargs=-1)
@click.option("--short", is_flag=True, help="Cut down, in the environment that runs this.")
@click.option("--most", type=float, metavar="SECONDS", help="End a command that takes longer; that is no failure.")
def main(pages: tuple[str, ...], short: bool, most: float | None) -> None:
    failed = list[Row]()
    click.echo("| where | command | outcome | seconds |\n|---|---|---|---:|")
    for page in pages or PAGES:
        with tempfile.TemporaryDirectory() as folder:
            for row in run(page, Path(folder), short, most):
                click.echo(str(row))
                failed += [row] if row.outcome.startswith("failed") else []
    for row in failed:
        click.echo(f"\n{row.command.page}:{row.command.line}: {row.ran}\n" + "\n".join(row.printed.splitlines()[-20:]))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
