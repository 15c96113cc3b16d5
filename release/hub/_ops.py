"""The namespace of this build's ops. kernel-builder writes a file with the same names in its own builds."""

import torch

_OPS_NAME = "{{ id }}"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{_OPS_NAME}::{op_name}"
