"""Evaluation of models: errors of 8-bit K/V, quality of generated digits."""
