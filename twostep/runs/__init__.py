"""Runs: a recipe read and checked, the folder that a run writes, and the loop under every training.

It knows nothing of what is trained.
"""
