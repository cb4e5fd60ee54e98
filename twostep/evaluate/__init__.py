"""Evaluation: how sets of pictures differ, as distributions and from seed to seed.

Takes images, never a pipeline: whatever drew them, they are measured by the same few functions.
"""
