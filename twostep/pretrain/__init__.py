"""Pretraining: the parts of the built-in models, and the drawings that they learn from.

`model` says what a size is made of, `drawings` and `captions` what it learns from; `vae`, `text`,
`teacher`, `control` and `judge` train one part each, and `parts` finds them by the names of their
recipes. The students are then made by `twostep distill nano`.
"""
