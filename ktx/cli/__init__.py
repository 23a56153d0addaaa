"""The commands of `python -m ktx`: one module each, with `add_arguments` and `run`."""
