"""`benchmarks.studies.nodes`: where the time of a call goes."""

import pytest
import torch
from click.testing import CliRunner

from benchmarks.studies import nodes


@pytest.mark.parametrize(("runtime", "kind"), [("compiled", "Region"), ("onnx", "Conv")])
def test_nodes_share_the_time_of_a_call(runtime: str, kind: str) -> None:
    threads = torch.get_num_threads()
    arguments = ["--workload", "tiny", "--runtime", runtime, "--batch", "2", "--threads", "1"]
    done = CliRunner().invoke(nodes.main, arguments)
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.output.splitlines()[2:] if line]
    *parts, (_, _, total, _) = rows
    assert kind in [name for name, *_ in parts]
    assert sum(float(ms) for *_, ms, _ in parts) == pytest.approx(float(total), abs=0.05 + 0.005 * len(parts))
    assert sum(float(share.rstrip("%")) for *_, share in parts) == pytest.approx(100, abs=0.05 * len(parts))
