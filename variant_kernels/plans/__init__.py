"""Plans in plain Python integers, without tensors: layouts, depth schedules and cache plans."""
