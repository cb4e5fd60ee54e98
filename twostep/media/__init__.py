"""Media <-> latents: codecs, and how a user's files become tensors. Networks that denoise are
unknown here.
"""
