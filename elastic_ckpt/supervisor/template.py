"""Preloaded by the forkserver, the process that workers are forked from.

Importing this ties the forkserver to the agent's life; workers do not inherit that and tie
themselves to the forkserver. Imported by nothing else.
"""

from elastic_ckpt.supervisor.processes import die_with_parent

die_with_parent()
