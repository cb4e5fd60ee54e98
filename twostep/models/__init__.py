"""Models as they are loaded from disk: a bundle of backbone, codec and text encoders, and how it
must be sampled.
"""
