"""Training by recipes: VQ-VAEs, transformers and depth supernets."""
