"""Distillation methods, one file each, and where they are found by name."""
