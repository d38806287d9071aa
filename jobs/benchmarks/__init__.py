"""One module per benchmark of `python -m jobs.benchmark NAME`: a dataclass of options with a method `measure`."""
