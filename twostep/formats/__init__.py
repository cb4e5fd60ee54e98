"""Other people's files: where a model lies, what a file is, and by which names its weights are
called.
"""
