"""Plans on integers: layouts, depth schedules and cache plans; no tensor."""
