"""How the built-in nano SDXL is made: what it is (`model`), and what trains its three parts, each by one recipe.

    python -m examples.nano nano-vae --out runs/nano-vae

What the parts learn from comes from `twostep.data`; the students are then made by `twostep distill nano`.
"""
