"""Which backend runs an op, and why."""
