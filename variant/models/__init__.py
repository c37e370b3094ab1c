"""The networks: a VAR transformer, a multi-scale VQ-VAE and their configurations."""
