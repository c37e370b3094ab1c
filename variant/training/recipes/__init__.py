"""Recipe files: TOML, one per experiment."""
