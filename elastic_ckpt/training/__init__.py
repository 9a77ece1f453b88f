"""What a training script imports: the session, the seed's two functions, the sampler."""

import logging

# As a library does: without a supervisor the script says where it goes, if anywhere.
logging.getLogger("elastic_ckpt").addHandler(logging.NullHandler())
