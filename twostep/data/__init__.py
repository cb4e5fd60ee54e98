"""Data: where pictures and captions come from, and the cache that training draws from; it trains
nothing.
"""
