"""Other people's weights: public checkpoints become models of ours, and some of ours become public checkpoints.

A converted model at capacity 1 computes what its source computes: alpha is 0, so the router changes nothing, and the
full expert is the dense model. Below capacity 1 it is only a start: public weights were not trained with nesting.

Reads folders only, with torch and safetensors; needs neither transformers nor timm, and unpickles nothing but tensors.
"""

from mone.interop.export import export_vivit
from mone.interop.families import FAMILIES, IMAGE_FAMILIES, Conversion, convert, family_of

__all__ = ["FAMILIES", "IMAGE_FAMILIES", "Conversion", "convert", "export_vivit", "family_of"]
