"""Half a million locations of one image cost the memory of their answers and of one chunk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_is_bounded_by_the_chunk_and_not_by_the_number_of_locations():
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--num_locations", str(2**19)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert measured["num_locations"] == 2**19 and measured["outputs_mib"] > 250
    assert measured["beyond_mib"] < 250  # a second copy of the answers would be more
