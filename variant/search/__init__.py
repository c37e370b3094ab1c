"""Schedules by search: which layers run at each scale, without training."""
