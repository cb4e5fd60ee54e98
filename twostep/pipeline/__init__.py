"""Drawing: a `Request` goes in, a `Result` comes out, and every file says how it was made.

`request` holds the wish and the answer, `studio` the loaded models, `prepare` makes text and
pictures ready, `generation` runs the sampler, `batching` lets requests share a batch without
changing a pixel, and `png` writes and reads files. Nothing here knows the command line, a server or
a trainer.
"""
