"""Packed formats: one file a library, which reads its layers and tensors without importing it.

A new library is a new file here that registers its reader in `core.quantized.readers`.
"""

from . import bitsandbytes, own

__all__ = ["bitsandbytes", "own"]
