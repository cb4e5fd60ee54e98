"""Models written for others to load: each file says of itself how it is to be sampled, and what it
is.

Beside it lie a card for a person and, where ComfyUI reads it, a workflow. What a model draws is
unknown here.
"""
