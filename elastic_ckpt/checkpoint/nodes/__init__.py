"""The memory of several nodes as one tier: each node holds what its own ranks have written.

::

    rank ──> its node's generation      sealed on every node, the leader's last
    head's supervisor ──> others        "copy your share to the disk": then the head seals there
    rank at a load ──> others           "send me this file": what other nodes' ranks have written

Each supervisor serves its node's generations over TCP to whoever has the secret of the run, which
goes through the job's own store.
"""
