"""Half a million locations of one image cost the memory of their answers and of one chunk."""

import json
import sys
from pathlib import Path

import pytest

from fixtures_runs import forked, status_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_is_bounded_by_the_chunk_and_not_by_the_number_of_locations(tmp_path):
    def measure():
        sys.path.insert(0, str(BENCHMARKS))
        import memory

        (tmp_path / "measured.json").write_text(json.dumps(memory.measure("tiny", 2**19, device="cpu")))

    assert status_of(forked(measure)) == 0
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured["num_locations"] == 2**19 and measured["outputs_mib"] > 250
    assert measured["beyond_mib"] < 250  # a second copy of the answers would be more
