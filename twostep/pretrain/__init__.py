"""Pretraining of the nano models: autoencoder, text encoders and teacher, each by one recipe and one loop.

What they learn from comes from `data`; what they are comes from `models`. Distillation is no matter of this room.
"""
