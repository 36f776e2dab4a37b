"""A lowered graph compiled ahead of time, by PyTorch's AOTInductor, into one file; and that file as a function.

The file is a zip archive with machine code in it: for one version of PyTorch, and one kind of processor or GPU. What it
says of itself is read without loading that code. The code trusts its caller, and reads memory as it was told when it
was compiled: everything about the arguments is looked at here.
"""

import json
import platform
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._aoti import AOTIModelPackageLoader  # torch._inductor's own does the same, after a second of imports
from torch.fx import Graph, GraphModule

from dgfast import bounds
from dgfast.errors import UserError, one_line
from dgfast.graph.nodes import constant
from dgfast.graph.trace import without_collecting

if TYPE_CHECKING:
    from torch.export import ExportedProgram

MADE_FOR, ARGUMENTS = "made_for", "arguments"
"""Keys of what a file says of itself: `machine`, and the forms of its arguments, as JSON."""
OURS = "dgfast"
"""Folder in the archive for what is no part of the code."""
_DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
_LARGEST = 2**28  # numbers of an argument, a batch of images: a file may lie
_NAME = "model"  # of the function in the archive, AOTInductor's default


@dataclass(frozen=True)
class Form:
    """How an argument lies in memory. dtype: its name, such as float32."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, x: Tensor) -> "Form":
        return cls(tuple(x.shape), x.stride(), str(x.dtype).removeprefix("torch."))

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> "Form":
        """
        Raises:
            KeyError, TypeError, ValueError: it is no form, or one of a tensor that reads one number twice.
        """
        form = cls(tuple(said["shape"]), tuple(said["stride"]), said["dtype"])
        sizes = sorted((step, size) for step, size in zip(form.stride, form.shape, strict=True) if size > 1)
        reach = 1
        for step, size in sizes:
            if not isinstance(step, int) or not isinstance(size, int) or step < reach:
                raise ValueError("numbers of an argument overlap")
            reach = step * size
        if form.dtype not in _DTYPES or reach > _LARGEST or not all(size > 0 for size in form.shape):
            raise ValueError(f"an argument of type {form.dtype} and shape {list(form.shape)}")
        return form

    def laid_out(self, x: Tensor, device: torch.device) -> Tensor:
        """`x` in this form on that device; itself, if it is.

        Raises:
            ValueError: it has another shape.
        """
        if tuple(x.shape) != self.shape:
            raise ValueError(f"a tensor has shape {list(x.shape)}, not {list(self.shape)}")
        if Form.of(x) == self and x.device == device:
            return x
        return torch.empty_strided(self.shape, self.stride, dtype=getattr(torch, self.dtype), device=device).copy_(x)


def machine(device: torch.device) -> str:
    """What compiled code is for: this PyTorch, and the kind of processor or GPU."""
    if device.type == "cuda":
        kind = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        kind = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__} on {kind}"


def write(
    graph: GraphModule, example: Sequence[Tensor | None], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Compile the graph, for arguments that lie in memory as the example's do, into a file whose name ends in .pt2.

    Args:
        metadata: what the file says of itself; its weights are in it then. None: neither, and whoever opens it hands
            the weights over.

    Raises:
        UserError: AOTInductor fails, or one of the compilers that it calls.
    """
    compile(lambda: exported(graph, example), settings(example, metadata), path)


def exported(graph: GraphModule, example: Sequence[Tensor | None]) -> "ExportedProgram":
    """The graph as PyTorch's compiler takes it."""
    return torch.export.export(_named_by_place(graph), tuple(example), strict=False)


def settings(example: Sequence[Tensor | None], metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What to tell AOTInductor; see `write`."""
    forms = [asdict(Form.of(x)) for x in example if x is not None]
    made_for = machine(next(x.device for x in example if x is not None))
    return {
        "aot_inductor.package_constants_in_so": metadata is not None,
        "aot_inductor.metadata": {**(metadata or {}), MADE_FOR: made_for, ARGUMENTS: json.dumps(forms)},
    }


def compile(program: "Callable[[], ExportedProgram]", settings: dict[str, Any], path: Path) -> None:
    """Compile a program to that file, in one move.

    Raises:
        UserError: AOTInductor fails, or one of the compilers that it calls.
    """
    import torch._inductor.config  # with the compiler, which takes a second

    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        new = Path(folder, path.name)
        try:
            # By its own choice AOTInductor writes what it packs where the code's hash says, and packs it afterwards:
            # of two processes with networks of one architecture, one would pack the other's weights.
            own_folder = torch._inductor.config.patch("aot_inductor.output_path", str(Path(folder, "parts")))
            with without_collecting(), own_folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of its own code
                torch._inductor.aoti_compile_and_package(program(), package_path=str(new), inductor_configs=settings)
        except Exception as error:  # the compilers' exceptions have no base class of their own
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"AOTInductor failed: {one_line(reason)}") from error
        new.replace(path)


def _weights(graph: GraphModule) -> dict[str, Tensor]:
    """By names that are the same whether a graph was traced or read from its file; each with memory of its own.

    PyTorch saves the part of a larger tensor with the whole, and warns of that off the CPU. The code reads by the
    strides that it was compiled for: whoever compiles and whoever opens take them from here.
    """
    nodes = enumerate(graph.graph.find_nodes(op="get_attr"))
    return {f"weight_{i}": _whole(constant(graph, node)) for i, node in nodes}


def _named_by_place(graph: GraphModule) -> GraphModule:
    copy, weights = Graph(), _weights(graph)
    copy.output(copy.graph_copy(graph.graph, {}))
    for node, name in zip(copy.find_nodes(op="get_attr"), weights, strict=True):
        node.target = name
    return GraphModule(weights, copy)


def _whole(x: Tensor) -> Tensor:
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def add(path: Path, members: Mapping[str, bytes]) -> None:
    """Put these into the file, by name, for `read`; it is the old one or the new one at every moment."""
    new = path.with_name(f".{path.name}.partial")
    try:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w") as archive:
            root = old.namelist()[0].partition("/")[0]
            added = {f"{root}/{OURS}/{name}": content for name, content in members.items()}
            for member in (member for member in old.infolist() if member.filename not in added):
                archive.writestr(member, old.read(member))
            for name, content in added.items():
                archive.writestr(name, content)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def read(path: Path, name: str) -> bytes:
    """What `add` put into the file under this name.

    Raises:
        UserError: there is nothing.
    """
    with _archive(path) as archive:
        for member in archive.namelist():
            if member.endswith(f"/{OURS}/{name}"):
                return archive.read(member)
    raise UserError(f"{path} has no {name} in it; make it anew with python -m dgfast.export.to_package")


def metadata(path: Path) -> dict[str, str]:
    """What the file says of itself. No byte of it is damaged.

    Raises:
        UserError: it is no package of dgfast, or damaged.
    """
    said: dict[str, str] = {}
    with _archive(path) as archive:
        if damaged := archive.testzip():
            raise UserError(f"{path} is damaged (in {one_line(damaged)}); make it anew")
        for member in archive.namelist():
            if member.endswith("_metadata.json"):
                found = bounds.parse_json(archive.read(member).decode())
                said |= found if isinstance(found, dict) else {}
    printable = all(isinstance(text, str) and text.replace("\n", "").isprintable() for text in said.values())
    if not said.keys() >= {MADE_FOR, ARGUMENTS} or not printable or "\n" in said[MADE_FOR]:
        raise UserError(f"{path} is not a package of dgfast; make one with python -m dgfast.export.to_package")
    return said


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """
    Raises:
        UserError: no such file, or it is no archive that can be read.
    """
    try:
        with bounds.open_file(path) as stream, zipfile.ZipFile(stream) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, as no package is")
            yield archive
    # NotImplementedError is what zipfile raises for a version or a compression that it does not know.
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, RecursionError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a package that can be read ({one_line(error)}); make it anew") from error


class Package:
    """A file as a function of tensors, in the order and shapes of its example, without those that were None.

    It runs on the current stream, and one call at a time.

    Attributes:
        path: the file. metadata: what it says of itself. forms: of its arguments. device: where they lie.
    """

    def __init__(self, path: Path, device: torch.device, weights: GraphModule | None = None) -> None:
        """
        Args:
            weights: the graph that the file was compiled from, if they are not inside.

        Raises:
            UserError: it is damaged, or made for another PyTorch, processor or GPU.
        """
        self.device = torch.empty(0, device=device).device  # with its number
        self.path, self.metadata = path, metadata(path)
        here = machine(self.device)
        if self.metadata[MADE_FOR] != here:
            raise UserError(f"{path} was made for {self.metadata[MADE_FOR]}, and here is {here}; make it anew here")
        try:
            self.forms = [Form.read(form) for form in bounds.parse_json(self.metadata[ARGUMENTS])]
            # Threads that share it would have to be told apart by events, which a CUDA graph cannot record.
            at = -1 if self.device.index is None else self.device.index
            package = AOTIModelPackageLoader(str(path), _NAME, True, 1, at)
            # The code has their addresses alone, so they are held here.
            held = _weights(weights) if weights else {}
            self._weights = {name: held[name] for name in package.get_constant_fqns()} if weights else {}
            if weights:
                package.load_constants(self._weights, False, True, True)  # all of them, and not copied
        except (RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: PyTorch does not load it ({one_line(error)}); make it anew") from error
        self._run = package.run

    @torch.no_grad()
    def __call__(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """
        Raises:
            ValueError: another number of tensors, or one of another shape.
        """
        present = [x for x in tensors if x is not None]
        return tuple(self._run([form.laid_out(x, self.device) for form, x in zip(self.forms, present, strict=True)]))
