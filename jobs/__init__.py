"""What a person submits: each module is `python -m jobs.NAME`, with `main(argv) -> int`."""
