"""Triton kernels of the `triton` backend. Installed as `flatlora_kernels.triton_kernels`."""
