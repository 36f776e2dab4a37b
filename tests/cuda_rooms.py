"""The rooms that only CUDA enters: of each file at least 95 % of the lines are executed by their tests, on a CPU.

python -m tests.cuda_rooms, after pytest --cov=dgfast/runtimes as `make test` runs it, prints each and fails where one
is left to a user's GPU.
"""

import sys

from coverage import Coverage

from dgfast.errors import UserError
from dgfast.runtimes.tensorrt.library import find
from tests.support.paths import ROOT

ROOMS, TENSORRT, LEAST = ("cuda/*.py", "onnx/cuda.py", "onnx/fused.py"), "tensorrt/*.py", 95


def rooms() -> tuple[str, ...]:
    """Those whose tests can run here: TensorRT for RTX is not for every Python and machine."""
    try:
        find("tensorrt-rtx")
    except UserError:
        return ROOMS
    return *ROOMS, TENSORRT


def main() -> int:
    measured, left = Coverage(), 0
    measured.load()
    for path in sorted(path for room in rooms() for path in (ROOT / "dgfast" / "runtimes").glob(room)):
        _, statements, _, missing, lines = measured.analysis2(str(path))
        percent = 100 * (1 - len(missing) / max(1, len(statements)))
        left += percent < LEAST
        print(f"{percent:5.1f} %  {path.relative_to(ROOT)}  {lines and f'not executed: {lines}'}")
    return left


if __name__ == "__main__":
    sys.exit(main())
