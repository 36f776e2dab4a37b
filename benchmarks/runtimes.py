"""The runtimes that are compared: dgfast's own, and what they have to beat. A new one is one line of `RUNTIMES`."""

from dgfast import runtimes
from dgfast.graph import Function
from dgfast.graph.cache import lowered
from dgfast.runtimes import Example, Runtime
from dgfast.runtimes.cuda.build import by_inductor


def _inductor(function: Function, example: Example) -> Function:
    """The traced and lowered function, whole, by torch's own compiler: on a CPU what dgfast's has to beat."""
    return by_inductor(lowered(function, example))


# In one launch where dgfast's own is: at batch 1 the host's launches would be what is compared.
RUNTIMES = runtimes.RUNTIMES | {"inductor": Runtime("inductor", _inductor, runtimes.RUNTIMES["compiled"].capture)}
WHEN_ASKED = ("inductor", "package")
"""Those that run only when asked for: they take minutes to compile."""
