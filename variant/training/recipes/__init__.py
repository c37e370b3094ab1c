"""The packaged recipes: TOML files, one per experiment."""
