"""From a video archive to annotations and training batches, on Ray Data.

archive -> probe -> timeline -> manifest -> decode -> tokenize -> predict -> annotations; each step is a module with a
core that runs without Ray.
"""
