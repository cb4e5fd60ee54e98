"""Models written for others to load: each file says of itself what it is and how it is sampled.

Beside it lie a card for a person and, where ComfyUI reads it, a workflow.
"""
