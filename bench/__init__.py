"""The fused noisy linear against what one would do without it. From a checkout: `python -m bench --help`."""
