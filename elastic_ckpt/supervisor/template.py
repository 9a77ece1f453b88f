"""Preloaded by the forkserver, the process that workers are forked from.

Importing this ties the forkserver to the agent's life; workers do not inherit that and tie
themselves to the forkserver. It also keeps what is preloaded after it from printing warnings that
no script could silence; ``quiet`` is left again in each worker.
"""

import warnings

from elastic_ckpt.supervisor.processes import die_with_parent

die_with_parent()

quiet = warnings.catch_warnings()
quiet.__enter__()
warnings.simplefilter("ignore")
