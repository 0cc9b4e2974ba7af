"""Benchmarks x methods x teachers x seeds, honestly; import from the modules inside.

`benchmarks` gives labelled images, `methods` predict them, `runner` does so sharded and resumable, `metrics` and
`statistics` score, `report` draws; `suites` are ready-made combinations for `apm evaluate`.
"""
