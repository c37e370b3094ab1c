"""VARiant: one set of VAR weights that runs at any depth."""
