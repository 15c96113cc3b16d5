"""What is computed, and nothing about how: the noise, and what a product with noise is made of."""
