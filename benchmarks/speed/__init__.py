"""What `benchmarks/run.py` measures: figures.py; against whom: rivals.py; how: timing.py; and writes: page.py."""
