"""Whether a cluster can do the work: what each node says of itself, and what follows from it."""
