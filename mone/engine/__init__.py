"""The fast way to run nested blocks: the same mathematics and weights as `mone.blocks`, the reference."""
