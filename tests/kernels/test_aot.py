"""Every kernel compiled for three generations of GPUs, with no GPU: nothing spills, and loads are not waited for."""

import pytest
import triton

from dgfast.kernels import resources

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: nothing is compiled")


@pytest.mark.parametrize("sm", resources.ARCHITECTURES, ids=lambda sm: f"sm{sm}")
@pytest.mark.parametrize("case", list(resources.cases()), ids=lambda case: f"{case.kernel.__name__}-{case.name}")
def test_kernels_compile_without_spills_and_load_while_they_compute(case: resources.Case, sm: int) -> None:
    """Two programs share a multiprocessor, or a program's own loads run ahead of its loop."""
    usage = resources.measure(case, sm)
    assert usage.stack == usage.local == 0, usage
    assert usage.programs >= (1 if case.how.get("num_stages", 1) > 1 else 2), usage
