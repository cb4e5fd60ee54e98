"""How the built-in nano SDXL is made and judged: what it is (`model`), what trains its parts, what
its pictures show.

    python -m examples.nano emoji                                    fetches and renders the drawings
    python -m examples.nano pretrain nano-vae --out runs/nano-vae    then nano-text and nano-teacher
    python -m examples.nano evaluate out/                            scores pictures against their prompts

What the parts learn from comes from `twostep.data`; the students are then made by `twostep distill
nano`.
"""
