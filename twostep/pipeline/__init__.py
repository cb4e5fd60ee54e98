"""Text to image: a `Request` goes in, a `Result` comes out, and every PNG says how it was made.

`request` holds the two nouns, `generation` runs the sampler, `png` writes and reads the pictures.
Nothing here remembers anything between two calls, and nothing here knows the command line, a server
or a trainer.
"""
