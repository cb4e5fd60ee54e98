"""Media <-> latents: codecs, and how a user's pictures become tensors."""
