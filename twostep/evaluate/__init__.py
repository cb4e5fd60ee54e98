"""Evaluation: what pictures show, by a judge that has seen real drawings only, and how sets of pictures differ.

Takes images, never a pipeline: whatever drew them, they are measured by the same few functions.
"""
