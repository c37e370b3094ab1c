"""Training images."""
