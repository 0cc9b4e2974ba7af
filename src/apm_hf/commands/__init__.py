"""The commands of `apm`, one a file.

A command's module has:

* `HELP`: one line for `apm --help`; `DESCRIPTION`: one paragraph for `apm COMMAND --help`;
* `EXAMPLES`: command lines that its own parser takes;
* `RESULT`: key -> meaning, of the JSON object that `--json` prints;
* `INTERRUPTED`: what is left, and how to go on, after Ctrl-C; `SMALLER`: the options that save memory;
* `add_options(parser)`; shared ones are in `options.py`, so that the same thing has the same name everywhere;
* `run(options)`, which returns what `RESULT` describes, or None in a process that has nothing to tell. What it prints
  goes to standard output, with `--json` to standard error. Errors that the user can mend are ValueError, OSError and
  ImportError; of several photos, those that failed stand under the key `errors`, and the exit status is 1.

Libraries that take long to load are imported where a command runs.
"""
