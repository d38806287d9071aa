"""Triton kernels for rows in expert-major order. They run on the CPU under TRITON_INTERPRET=1, to be tested."""
