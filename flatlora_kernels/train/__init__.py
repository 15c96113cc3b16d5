"""Training under weight noise: the controller of seed and strength, its layers, and what compiles their kernels."""
