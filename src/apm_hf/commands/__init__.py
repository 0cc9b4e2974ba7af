"""The commands of `apm`, one a file: `HELP`, `add_options(parser)` and `run(options)`, which returns the exit status.

Libraries that take long to load are imported where a command runs.
"""
