"""Mixture of Nested Experts for video, in PyTorch.

Source: "Mixture of Nested Experts: Adaptive Processing of Visual Tokens" (Jain et al., NeurIPS 2024, arXiv
2407.19985) on ViViT's factorised encoder (Arnab et al., ICCV 2021). This package knows nothing of Ray, Arrow or video
files. Start with `mone.model.ViViT`; the arithmetic of tokens is in `tubelets`, of budgets in `capacity`.

Importing the package imports no torch, so that a decoding process which only needs `mone.tubelets` stays small.
"""
