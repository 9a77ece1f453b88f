"""Every plugin of ColossalAI's: a resume is exact where its own is not."""

import pytest

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

from elastic_ckpt.store.verify import verify_full
from tests import plugins
from tests.integration.ranks import run_ranks
from tests.plugins import SETUPS, STEPS, Setup

by_name = pytest.mark.parametrize("setup", SETUPS, ids=[setup.name for setup in SETUPS])


def run(function, setup: Setup, *args):
    results = run_ranks(function, setup.ranks, setup, *args, seconds=120)
    for result in results:
        failed = isinstance(result, int) or (result and isinstance(result[0], str))
        assert not failed, results
    return results


@by_name
def test_a_resume_is_exact(setup, tmp_path):
    if plugins.why_not_here(setup):
        pytest.skip(plugins.why_not_here(setup))
    directory = str(tmp_path / "job")
    undisturbed = run(plugins.train_and_save, setup, directory)
    verify_full(tmp_path / "job" / f"epoch-0_step-{STEPS}")
    assert run(plugins.load_and_train, setup, directory) == undisturbed
