"""Packed formats: one file a library, which reads its layers and tensors without importing it.

A new library is a new file here that registers its reader in `core.quantized.readers`.
"""

from . import bitsandbytes, compressed_tensors, gptqmodel, hqq, own, torchao, transformers

__all__ = ["bitsandbytes", "compressed_tensors", "gptqmodel", "hqq", "own", "torchao", "transformers"]
