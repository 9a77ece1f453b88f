"""What a training script imports: the session, the seed's two functions, the sampler."""

import logging

# As a library: without a supervisor the script decides where the log goes, if anywhere.
logging.getLogger("elastic_ckpt").addHandler(logging.NullHandler())
