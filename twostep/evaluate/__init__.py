"""Evaluation: what pictures show, and how sets of them differ.

Takes pictures, never a pipeline: whatever drew them, they are measured by the same few functions.
"""
