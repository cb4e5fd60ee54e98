"""How the built-in nano SDXL is made: what it is (`model`), and what trains its three parts, each by one recipe.

    python -m examples.nano emoji                                    fetches and renders the drawings
    python -m examples.nano pretrain nano-vae --out runs/nano-vae    then nano-text and nano-teacher

What the parts learn from comes from `twostep.data`; the students are then made by `twostep distill nano`.
"""
