"""The `quire` command: `main.py` finds the sub-command; each is a file with `add_options` and `main`.

A sub-command imports what it needs inside `main`, so that `--help` loads no torch. `options.py` turns the
fields of `Config` into flags; nothing here adds an option of the engine.
"""
