"""Where there is no GPU, the tests of kernels run in Triton's interpreter.

It is chosen before Triton is first imported, so that it takes a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.kernels import INTERPRETED, ON_GPU
from tests.support.paths import ROOT


@pytest.mark.long
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="kernels run in this process")
def test_kernels_in_the_interpreter() -> None:
    subjects = ("group_norm", "attention", "switch")
    paths = [str(Path(__file__).with_name(f"test_{subject}.py")) for subject in subjects]
    command = [sys.executable, "-m", "pytest", *paths, "-q", "--tb=short", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
