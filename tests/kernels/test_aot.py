"""Every kernel compiled for three generations of GPUs, with no GPU: nothing spills, and two fit side by side."""

import pytest
import triton

from dgfast.kernels import resources

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: nothing is compiled")


@pytest.mark.parametrize("sm", resources.ARCHITECTURES, ids=lambda sm: f"sm{sm}")
@pytest.mark.parametrize("case", list(resources.cases()), ids=lambda case: f"{case.kernel.__name__}-{case.name}")
def test_kernels_compile_without_spills_and_share_a_multiprocessor(case: resources.Case, sm: int) -> None:
    usage = resources.measure(case, sm)
    assert usage.stack == usage.local == 0, usage
    assert usage.programs >= 2, usage
