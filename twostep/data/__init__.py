"""Data: where pictures and captions come from; it knows nothing of networks.

The built-in emoji set (`emoji`) and its captions (`captions`) are what the nano models learn from.
"""
