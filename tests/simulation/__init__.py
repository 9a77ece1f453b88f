"""Whole jobs under a virtual clock: the real supervisor, head, member and cluster rules, in a world
that is drawn from a seed. ``python -m tests.simulation SEED`` replays one.

The real code runs behind the ports of ``supervisor/ports.py`` and ``agent/member_ports.py``.
Hosts, processes, ranks, network, disk and memory tier are models: ``hosts.py``, ``ranks.py``,
``network.py``, ``storage.py``. ``faults.py`` draws what goes wrong; ``world.py`` restarts runs as a
requeue would, and checks the invariants at each event.
"""
