"""Networks that denoise: backbones, what they are conditioned on, adapters on them, and what they
are found to predict.
"""

import logging

# PEFT imports bitsandbytes where it is installed, and on a CPU that warns of kernels that nothing
# here uses.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
