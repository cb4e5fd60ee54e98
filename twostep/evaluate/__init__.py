"""Evaluation: how sets of pictures differ, as distributions.

Takes images, never a pipeline: whatever drew them, they are measured by the same few functions.
"""
