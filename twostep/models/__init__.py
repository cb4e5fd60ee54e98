"""Models: networks as denoisers, codecs and text encoders, and the bundle that holds them as loaded from disk.

Here, and nowhere below, diffusers and transformers are known. How a model is trained or asked is not.
"""

import logging

# PEFT imports it where it is installed, and on a CPU it warns of kernels that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
