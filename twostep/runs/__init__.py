"""Runs: a recipe read and checked, and the folder that a run writes; it knows nothing of networks."""
