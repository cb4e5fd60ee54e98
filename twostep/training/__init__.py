"""Training, whatever is trained: recipes, run folders, the loop, optimisers, several processes.

This room knows no diffusion.
"""
