"""What compilers make of the kernels, read without a GPU, and kernels compiled ahead of their first launch."""
