"""One schedule from its seed."""

from __future__ import annotations

import logging

from tests.simulation.faults import draw_faults
from tests.simulation.kernel import Violation
from tests.simulation.world import World

logging.getLogger("elastic_ckpt").setLevel(logging.CRITICAL)


def simulate(seed: int, log: list[str] | None = None) -> str | None:
    """Run the schedule of a seed; return the violated invariant, None if all hold.

    Args:
        log: gets a line for each thing that happens.
    """
    world = World(seed)
    world.kernel.log = log
    draw_faults(world)
    world.begin()
    try:
        world.go()
    except Violation as error:
        return f"{error} (at {world.kernel.now:.2f} s)"
    return None
