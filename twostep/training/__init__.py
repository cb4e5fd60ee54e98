"""Training, whatever is trained: recipes, run folders, the loop, optimisers, several processes. It
knows no diffusion.
"""
