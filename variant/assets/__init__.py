"""Models shipped with the package."""
