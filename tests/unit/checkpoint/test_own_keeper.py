"""The script's own checkpoints: what is sealed, what is set aside, and what a restart gets."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner

from elastic_ckpt.checkpoint.catalog import list_checkpoints, newest_of_job
from elastic_ckpt.checkpoint.lineage import restore
from elastic_ckpt.checkpoint.own import watched
from elastic_ckpt.checkpoint.own.files import matches, stamps_of
from elastic_ckpt.checkpoint.own.keeper import OwnKeeper
from elastic_ckpt.checkpoint.own.reports import Reports
from elastic_ckpt.checkpoint.own.seal import OwnSeal, seal, seals, where_intact, write
from elastic_ckpt.cli.prune import command as prune_command
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.own_saves import own_saves
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import unwatched


class Place:
    """A job whose script writes below ``base``."""

    def __init__(self, root: Path) -> None:
        self.base = root / "work"
        self.base.mkdir()
        self.job = JobDirectory(root / "job")
        self.job.prepare()
        self.sealed: list[OwnSeal] = []
        self.aside: list[tuple[str, str]] = []
        self.said: list[str] = []

    def keeper(self, *patterns: str, retention: Retention | None = None, **rules: str) -> OwnKeeper:
        return OwnKeeper(
            self.job,
            own_saves(
                watch=patterns or ("out/checkpoint-*",), on_notice=None,
                resume_args=[rules["resume_args"]] if "resume_args" in rules else (),
                complete_when=rules.get("complete_when", "state.json"),
                finished_when=rules.get("finished_when"),
            ),
            self.base,
            run=1,
            retention=retention or Retention(),
            reports=Reports(
                self.sealed.append,
                lambda path, _, why: self.aside.append((path.name, why)),
                unwatched,
                self.said.append,
            ),
        )  # fmt: skip

    def save(self, step: int, *, whole: bool = True, value: float = 1.0) -> Path:
        path = self.base / "out" / f"checkpoint-{step}"
        path.mkdir(parents=True, exist_ok=True)
        torch.save(torch.full((64,), value), path / "model.pt")
        if whole:
            (path / "state.json").write_text(json.dumps({"step": step}))
        return path

    def overwrite(self, value: float) -> Path:
        path = self.base / "last.pt"
        torch.save(torch.full((64,), value), path)
        return path


def never() -> bool:
    return False


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def names(place: Place) -> list[str]:
    return [Path(one.path).name for one in seals(place.job)]


def test_a_directory_is_sealed_once_its_last_file_is_there_and_nothing_changes(
    place: Place,
) -> None:
    keeper = place.keeper()
    path = place.save(10, whole=False)
    keeper.look(0.0)
    keeper.look(5.0)
    assert names(place) == []
    (path / "state.json").write_text("{}")
    keeper.look(6.0)
    (path / "rng_1.pt").write_bytes(b"another rank is slower")
    keeper.look(6.5)
    keeper.look(7.4)
    assert names(place) == []
    keeper.look(7.5)
    assert names(place) == ["checkpoint-10"]
    assert {entry.path for entry in seals(place.job)[0].files} == {
        "model.pt", "rng_1.pt", "state.json",
    }  # fmt: skip
    assert sorted(entry.name for entry in path.iterdir()) == ["model.pt", "rng_1.pt", "state.json"]


def test_a_file_that_comes_after_the_last_one_is_sealed_too_but_not_half_an_overwrite(
    place: Place,
) -> None:
    keeper = place.keeper()
    path = place.save(10)
    keeper.look(0.0)
    keeper.look(2.0)
    (path / "rng_1.pt").write_bytes(b"a rank that is much slower")
    keeper.look(3.0)
    keeper.look(5.0)
    (sealed,) = seals(place.job)
    assert "rng_1.pt" in {entry.path for entry in sealed.files}
    torch.save(torch.zeros(64), path / "model.pt")  # the same checkpoint once more
    keeper.look(6.0)
    keeper.look(20.0)
    assert seals(place.job) == [sealed]
    (path / "state.json").write_text("{}")
    keeper.look(21.0)
    keeper.look(23.0)
    assert seals(place.job)[0].number > sealed.number


def test_a_torn_directory_is_set_aside_before_a_start(place: Place) -> None:
    keeper = place.keeper()
    place.save(10)
    assert keeper.prepare(never) == str(place.base / "out/checkpoint-10")
    torn = place.save(20, whole=False)
    assert keeper.prepare(never) == str(place.base / "out/checkpoint-10")
    assert not torn.exists()
    assert [name for name, _ in place.aside] == ["checkpoint-20"]
    assert "state.json is missing" in place.aside[0][1]


def test_a_damaged_newest_one_is_set_aside_and_the_one_before_it_is_next(place: Place) -> None:
    keeper = place.keeper()
    place.save(10)
    keeper.look(0.0)
    keeper.look(2.0)
    newest = place.save(20)
    keeper.look(3.0)
    keeper.look(5.0)
    assert names(place) == ["checkpoint-20", "checkpoint-10"]
    data = bytearray((newest / "model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "model.pt").write_bytes(data)
    fresh = place.keeper()
    assert fresh.prepare(never) == str(place.base / "out/checkpoint-10")
    assert not newest.exists()
    assert "changed after it was sealed" in place.aside[0][1]


def test_the_newest_is_the_one_that_was_written_last_not_the_one_with_the_largest_number(
    place: Place,
) -> None:
    keeper = place.keeper()
    for at, step in enumerate((300, 100)):
        place.save(step)
        keeper.look(at * 10.0)
        keeper.look(at * 10.0 + 2)
    assert keeper.prepare(never).endswith("checkpoint-100")


def test_patterns_that_are_announced_later_do_not_reuse_the_number_of_a_seal(place: Place) -> None:
    """A new run's keeper is told what to watch only after it was made."""
    rules = place.keeper().rules
    for step in (100, 200, 300):
        keeper = place.keeper("nothing-*")
        keeper.rules = rules
        place.save(step)
        keeper.settle(left_well=True)
    assert names(place) == ["checkpoint-300", "checkpoint-200", "checkpoint-100"]


def test_what_the_script_deletes_itself_is_forgotten(place: Place) -> None:
    keeper = place.keeper()
    for at, step in enumerate((10, 20)):
        path = place.save(step)
        keeper.look(at * 10.0)
        keeper.look(at * 10.0 + 2)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    keeper.look(30.0)
    assert names(place) == ["checkpoint-10"]
    assert place.aside == []


def test_a_file_that_is_overwritten_is_copied_and_its_copy_put_back(place: Place) -> None:
    keeper = place.keeper("last.pt", complete_when="quiet:2s")
    path = place.overwrite(1.0)
    good = path.read_bytes()
    keeper.look(0.0)
    keeper.look(3.0)
    assert names(place) == ["last.pt"]
    path.write_bytes(good[: len(good) // 2])  # killed in the middle of the next save
    found = newest_of_job(place.job)
    assert found is not None
    assert found.intact
    assert found.path.read_bytes() == good  # its copy
    assert place.keeper("last.pt", complete_when="quiet:2s").prepare(never) == str(path)
    assert path.read_bytes() == good
    assert [name for name, _ in place.aside] == ["last.pt"]


def test_a_whole_file_that_nobody_saw_complete_is_sealed_before_a_start(place: Place) -> None:
    keeper = place.keeper("last.pt", complete_when="quiet:2s")
    place.overwrite(1.0)
    keeper.look(0.0)
    keeper.look(3.0)
    path = place.overwrite(2.0)  # the supervisor was killed within the two seconds
    assert place.keeper("last.pt", complete_when="quiet:2s").prepare(never) == str(path)
    assert torch.load(path, weights_only=True)[0] == 2.0
    assert place.aside == []


def test_a_directory_without_a_last_file_is_not_trusted_after_a_kill(place: Place) -> None:
    keeper = place.keeper(complete_when="quiet:2s")
    assert keeper.prepare(never) == ""
    place.save(10)
    keeper.look(0.0)
    keeper.look(3.0)
    place.save(20)
    assert keeper.prepare(never).endswith("checkpoint-10")
    assert [name for name, _ in place.aside] == ["checkpoint-20"]


def test_the_first_one_is_not_trusted_after_a_kill_either(place: Place) -> None:
    assert place.keeper(complete_when="quiet:2s").prepare(never) == ""
    place.save(10)
    assert place.keeper(complete_when="quiet:2s").prepare(never) == ""
    assert [name for name, _ in place.aside] == ["checkpoint-10"]
    other = place.base / "other-1"
    other.mkdir()
    (other / "weights").write_bytes(b"1")
    both = place.keeper("out/checkpoint-*", "other-*", complete_when="quiet:2s")
    assert both.prepare(never) == str(other)  # a pattern that is new


@pytest.mark.parametrize("torn", [b"", b"no archive"])
def test_a_file_that_shows_no_end_of_its_own_is_not_trusted_after_a_kill(
    place: Place, torn: bytes
) -> None:
    keeper = place.keeper("last.pt", complete_when="quiet:2s")
    keeper.prepare(never)
    path = place.overwrite(1.0)
    good = path.read_bytes()
    keeper.look(0.0)
    keeper.look(3.0)
    path.write_bytes(torn)
    keeper.settle(left_well=False)
    assert place.keeper("last.pt", complete_when="quiet:2s").prepare(never) == str(path)
    assert path.read_bytes() == good


def test_a_file_that_is_rewritten_all_the_time_is_sealed_as_it_is(place: Place) -> None:
    keeper = place.keeper("last.pt", complete_when="quiet:5s")
    for second in range(5):
        place.overwrite(float(second))
        keeper.look(float(second))
    assert names(place) == []
    path = place.overwrite(5.0)
    path.write_bytes(path.read_bytes()[:-9])
    keeper.look(5.0)
    assert names(place) == []
    place.overwrite(6.0)
    keeper.look(6.0)
    assert names(place) == ["last.pt"]
    place.overwrite(7.0)
    keeper.look(7.0)
    keeper.look(8.0)
    assert names(place) == ["last.pt", "last.pt"]  # an archive need not rest for five seconds


def test_an_older_copy_is_not_taken_for_the_file_that_has_replaced_it(place: Place) -> None:
    keeper = place.keeper("last.pt", complete_when="quiet:2s")
    for at in range(2):
        path = place.overwrite(float(at))
        keeper.look(at * 10.0)
        keeper.look(at * 10.0 + 3)
    newer, older = (where_intact(place.job, one) for one in seals(place.job))
    assert newer == path
    assert torch.load(older, weights_only=True)[0] == 0.0


def test_what_was_there_before_the_first_run_is_taken_over(place: Place) -> None:
    place.save(10)
    keeper = place.keeper(complete_when="quiet:2s")
    assert keeper.prepare(never).endswith("checkpoint-10")
    assert names(place) == ["checkpoint-10"]


def test_what_was_complete_at_the_notice_does_not_count_as_saved_because_of_it(
    place: Place,
) -> None:
    keeper = place.keeper(complete_when="quiet:5s")
    place.save(10)
    keeper.look(0.0)
    keeper.mark(1.0)
    keeper.look(6.0)
    assert names(place) == ["checkpoint-10"]
    assert keeper.newest_marked == keeper.newest
    assert not keeper.since_mark
    place.save(20)
    keeper.look(7.0)
    keeper.look(13.0)
    assert names(place)[0] == "checkpoint-20"
    assert keeper.newest_marked != keeper.newest
    assert keeper.since_mark


def test_a_save_that_was_under_way_at_the_notice_is_no_reason_to_leave_early(place: Place) -> None:
    keeper = place.keeper()
    path = place.save(10, whole=False)
    keeper.mark(0.0)
    (path / "state.json").write_text("{}")
    keeper.look(1.0)
    keeper.look(3.0)
    assert keeper.newest is not None
    assert keeper.newest_marked is None
    assert not keeper.since_mark


def test_copies_are_kept_but_not_for_ever(place: Place) -> None:
    keeper = place.keeper("last.pt", complete_when="quiet:2s")
    for at in range(5):
        place.overwrite(float(at))
        keeper.look(at * 10.0)
        keeper.look(at * 10.0 + 3)
    assert [one.number for one in seals(place.job)] == [5, 4]
    assert sorted(path.name for path in place.job.own_copies.iterdir()) == ["000004", "000005"]


def test_only_a_rule_of_the_users_deletes_what_the_script_keeps(place: Place) -> None:
    for retention, left in ((Retention(), 4), (Retention(last=3), 3), (Retention(last=1), 2)):
        keeper = place.keeper(retention=retention)
        for at, step in enumerate((10, 20, 30, 40)):
            place.save(step, value=float(at))
            keeper.look(at * 10.0)
            keeper.look(at * 10.0 + 2)
        assert len(list((place.base / "out").iterdir())) == left
        assert len(seals(place.job)) == left


def test_a_fall_back_sets_the_newest_aside_unless_it_is_the_only_one(place: Place) -> None:
    keeper = place.keeper()
    place.save(10)
    keeper.look(0.0)
    keeper.look(2.0)
    assert keeper.fall_back("step failed twice") is None
    place.save(20)
    keeper.look(3.0)
    keeper.look(5.0)
    fallen = keeper.fall_back("step failed twice")
    assert fallen is not None
    assert fallen.path.endswith("checkpoint-20")
    assert keeper.prepare(never).endswith("checkpoint-10")


def test_what_looks_like_a_mistake_is_said_once(place: Place) -> None:
    keeper = place.keeper()
    for at in (1.0, 500.0, 700.0, 900.0):
        keeper.look(at)
    assert len(place.said) == 1
    assert "nothing is there" in place.said[0]
    place.save(10, whole=False)
    for at in (1000.0, 1500.0, 1700.0, 1900.0):
        keeper.look(at)
    assert len(place.said) == 2
    assert "state.json" in place.said[1]


def test_a_pattern_that_matched_nothing_is_said_when_the_script_has_ended(place: Place) -> None:
    keeper = place.keeper()
    keeper.settle(left_well=False)  # it crashed before its first save
    assert place.said == []
    for _ in range(2):
        keeper.settle(left_well=True)
    (line,) = place.said
    assert "out/checkpoint-*: nothing is there, and the script has ended" in line
    assert str(place.base) in line
    path = place.save(10, whole=False)
    keeper.settle(left_well=True)
    assert f"{path} is not complete by --complete-when state.json" in place.said[1]
    place.save(20)
    keeper.settle(left_well=True)
    assert len(place.said) == 2


@pytest.mark.parametrize(
    ("complete_when", "saves", "at", "why", "refused"),
    [
        pytest.param("state.json", {}, 50, "", False, id="not yet"),
        pytest.param("state.json", {}, 70, "nothing is there; relative", False, id="nothing there"),
        pytest.param("meta.json", {0: 10}, 50, "", False, id="one that was written just now"),
        pytest.param("meta.json", {0: 10}, 70, "one checkpoint is there, not complete by "
                     "--complete-when meta.json", False, id="one that rests"),
        pytest.param("meta.json", {0: 10, 40: 20}, 70, "2 checkpoints are there, none complete by "
                     "--complete-when meta.json", True, id="a wrong name"),
        pytest.param("quiet:5m", {0: 10}, 400, "", False, id="a long rest is wanted"),
        pytest.param("exit", {}, 700, "", False, id="nothing is expected before the end"),
        pytest.param("state.json", {0: 10}, 70, "", False, id="sealed"),
    ],
)  # fmt: skip
def test_status_gets_to_know_after_a_minute_that_nothing_is_sealed(
    place: Place, complete_when: str, saves: dict[int, int], at: int, why: str, refused: bool
) -> None:
    keeper = place.keeper(complete_when=complete_when)
    for now in range(0, at + 1, 10):
        if now in saves:
            place.save(saves[now])
        keeper.look(1.0 + now)
    trouble = keeper.mistakes.trouble
    assert (trouble is not None) == bool(why)
    if trouble is not None:
        assert trouble.text.startswith(f"--watch out/checkpoint-*: {why}")
        assert trouble.refused is refused
        keeper.look(2.0 + at)
        assert keeper.mistakes.trouble is trouble, "the record would be written each second"
    else:
        place.save(99, whole=False)  # the script ends before it is complete
        keeper.settle(left_well=False)
        assert keeper.mistakes.trouble is None


def test_the_end_of_the_script_shows_at_once_that_nothing_is_sealed(place: Place) -> None:
    keeper = place.keeper()
    keeper.settle(left_well=True)
    assert keeper.mistakes.trouble is not None
    place.save(10)
    keeper.settle(left_well=True)
    keeper.look(0.0)
    assert keeper.mistakes.trouble is None


def test_what_never_rests_is_said_once(place: Place) -> None:
    keeper = place.keeper("out", complete_when="quiet:20s")
    for at in range(0, 1000, 10):
        place.save(10, value=float(at))
        (place.base / "out/train.log").write_text("x" * at)
        keeper.look(1.0 + at)
    (line,) = place.said
    assert "has been changing for 10 min" in line
    assert "quiet:20s" in line


def test_a_base_that_the_seals_do_not_lie_below_is_said(place: Place, tmp_path: Path) -> None:
    sealed = place.save(10)
    place.keeper().prepare(never)
    place.base = tmp_path / "another"
    place.base.mkdir()
    assert place.keeper().prepare(never) == ""
    (line,) = place.said
    assert str(sealed) in line and str(place.base) in line


@pytest.mark.parametrize("how", ["taken over", "together", "at the end"])
def test_several_that_are_sealed_together_are_in_the_order_of_their_writing(
    place: Place, how: str
) -> None:
    keeper = place.keeper()
    for at, step in enumerate((95, 100, 500, 1000), 1):
        path = place.save(step)
        for file in path.iterdir():
            os.utime(file, ns=(at * 10**9, at * 10**9))
    if how == "together":
        keeper.look(0.0)
        keeper.look(2.0)
    elif how == "at the end":
        keeper.settle(left_well=False)
    assert keeper.prepare(never).endswith("checkpoint-1000")
    assert names(place) == ["checkpoint-1000", "checkpoint-500", "checkpoint-100", "checkpoint-95"]


def test_a_file_needs_no_last_file_in_it(place: Place) -> None:
    """--watch 'out/checkpoint-*' --watch last.pt --complete-when state.json"""
    keeper = place.keeper("out/checkpoint-*", "last.pt")
    place.save(10)
    keeper.prepare(never)
    best = place.overwrite(2.0)
    keeper.look(0.0)
    keeper.look(2.0)
    assert names(place) == ["last.pt", "checkpoint-10"]
    place.overwrite(3.0)
    keeper.prepare(never)
    assert best.exists()
    assert place.aside == []


def test_newest_is_of_the_first_pattern_where_the_script_is_told_what_to_load(
    place: Place,
) -> None:
    """The best weights are written last, and no script can resume from them."""
    both = ("out/checkpoint-*", "last.pt")
    keeper = place.keeper(*both, resume_args="--resume {newest}")
    place.save(5)
    keeper.prepare(never)
    keeper.mark(0.0)
    place.overwrite(2.0)
    keeper.look(1.0)
    keeper.look(3.0)
    assert not keeper.since_mark
    for at, step in ((4.0, 10), (8.0, 20)):
        place.save(step)
        best = place.overwrite(float(step))
        later = time.time_ns() + 10**9
        os.utime(best, ns=(later, later))
        keeper.look(at)
        keeper.look(at + 2)
    assert keeper.since_mark
    newest = newest_of_job(place.job)
    assert newest is not None and newest.path.name == "checkpoint-20"
    assert keeper.newest is not None and keeper.newest.path.endswith("checkpoint-20")
    again = place.keeper(*both, resume_args="--resume {newest}").prepare(never)
    assert again.endswith("checkpoint-20")
    for options in ({}, {"resume_args": "--resume"}):  # it finds its newest itself
        assert place.keeper(*both, **options).prepare(never).endswith("last.pt")
    other = place.keeper(*both[::-1], resume_args="--resume {newest}").prepare(never)
    assert other.endswith("last.pt")


def test_checkpoints_are_not_moved_because_of_a_wrong_name_of_the_last_file(place: Place) -> None:
    for step in (10, 20):
        place.save(step)
    with pytest.raises(UsageError, match="none of the 2 checkpoints"):
        place.keeper(complete_when="trainer_state.json").prepare(never)
    assert place.aside == []
    assert place.keeper().prepare(never).endswith("checkpoint-20")


@pytest.mark.parametrize("name", ["checkpoint-10", "out/checkpoint-10", "epoch-0_step-10"])
def test_how_to_go_back_to_the_scripts_own_is_said(place: Place, name: str) -> None:
    keeper = place.keeper()
    for step in (10, 20):
        place.save(step)
        keeper.prepare(never)
    newer = f"mv {place.base / 'out/checkpoint-20'} ELSEWHERE"
    with pytest.raises(UsageError, match=re.escape(newer)):
        restore(place.job, name, "restore")
    with pytest.raises(UsageError, match="no checkpoint called"):
        restore(place.job, "checkpoint-99", "restore")


def test_prune_says_that_it_leaves_the_scripts_own_alone(place: Place) -> None:
    place.save(10)
    place.keeper().prepare(never)
    shown = CliRunner().invoke(prune_command, [str(place.job.root), "--keep-last", "1"])
    assert "1 of the script's own were left alone" in shown.output
    assert names(place) == ["checkpoint-10"]


def test_a_seal_that_was_changed_counts_for_nothing(place: Place) -> None:
    keeper = place.keeper()
    place.save(10)
    keeper.look(0.0)
    keeper.look(2.0)
    seal = next(place.job.own_seals.glob("*.json"))
    seal.write_bytes(seal.read_bytes().replace(b"checkpoint-10", b"checkpoint-99"))
    assert seals(place.job) == []
    assert list_checkpoints(place.job) == []


def change_model(path: Path) -> None:
    torch.save(torch.zeros(64), path / "model.pt")


def add_a_file(path: Path) -> None:
    (path / "optimizer.pt").write_bytes(b"not sealed")


def lead_away(path: Path) -> None:
    (path / "model.pt").unlink()
    (path / "model.pt").symlink_to("/etc/passwd")


@pytest.mark.parametrize("harm", [change_model, add_a_file, lead_away])
def test_no_restart_gets_what_was_changed_after_the_seal(
    place: Place, harm: Callable[[Path], None]
) -> None:
    keeper = place.keeper(complete_when="quiet:2s")
    for at, step in enumerate((10, 20)):
        path = place.save(step)
        keeper.look(at * 10.0)
        keeper.look(at * 10.0 + 3)
    harm(path)
    assert place.keeper(complete_when="quiet:2s").prepare(never).endswith("checkpoint-10")
    assert not path.exists()
    assert Path("/etc/passwd").exists()


def test_a_seal_of_a_path_that_no_pattern_matches_has_nothing_moved(place: Place) -> None:
    keeper = place.keeper(retention=Retention(last=1))
    mine = place.base / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    stamps = stamps_of(mine)
    for number, path in enumerate(("mine", "out/../mine", "out/checkpoint-1/../../mine"), 7):
        forged = seal(mine, stamps, number=number, step=1, run=1, incarnation=1)
        write(place.job, msgspec.structs.replace(forged, path=str(place.base / path)))
    (mine / "thesis.txt").write_text("precious, and longer")
    place.save(10)
    assert keeper.prepare(never).endswith("checkpoint-10")
    assert (mine / "thesis.txt").read_text() == "precious, and longer"
    assert place.aside == []


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/w/out/checkpoint-1", True),
        ("/w/out/checkpoint-1/x", False),
        ("/w/out/x", False),
        ("/w/last.pt", True),
        ("/elsewhere/out/checkpoint-1", False),
        ("/abs/s1.pt", True),
    ],
)
def test_paths_that_patterns_match(path: str, found: bool) -> None:
    patterns = ("out/checkpoint-*", "last.pt", "/abs/s*.pt")
    assert matches(patterns, Path("/w"), Path(path)) is found


@pytest.fixture
def reboot(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the machine have been started again."""
    boots = iter(range(1, 100))
    return lambda: monkeypatch.setattr(watched, "_boot", f"boot {next(boots)}".strip)


def test_after_a_reboot_the_last_file_proves_nothing(
    place: Place, reboot: Callable[[], None]
) -> None:
    keeper = place.keeper()
    older = place.save(10)
    assert keeper.prepare(never) == str(older)
    newer = place.save(20)  # and the power is cut before it is sealed
    reboot()
    assert place.keeper().prepare(never) == str(older)
    assert not newer.exists()
    ((name, why),) = place.aside
    assert name == newer.name and "not sealed before the machine went down" in why
    # Its user knows that it is intact, and moves it back as the line says.
    (aside,) = (path for path in place.job.quarantine.iterdir() if path.is_dir())
    aside.rename(newer)
    assert place.keeper().prepare(never) == str(newer)


def test_after_a_reboot_checksums_prove_a_file(place: Place, reboot: Callable[[], None]) -> None:
    keeper = place.keeper("*.pt", "*.safetensors", complete_when="quiet:20s")
    keeper.prepare(never)
    summed, other = place.overwrite(1.0), place.base / "a.safetensors"
    other.write_bytes((2).to_bytes(8, "little") + b"{}")
    reboot()
    place.keeper("*.pt", "*.safetensors", complete_when="quiet:20s").prepare(never)
    assert names(place) == [summed.name]
    assert [name for name, _ in place.aside] == [other.name]


def test_after_a_reboot_an_overwritten_file_is_read_to_its_end(
    place: Place, reboot: Callable[[], None]
) -> None:
    """Only its copy was synced, so its size and time may be on the disk, and not its bytes."""
    patterns = ("out/checkpoint-*", "last.pt")
    keeper = place.keeper(*patterns)
    keeper.prepare(never)
    older = place.overwrite(1.0).read_bytes()
    keeper.look(0.0)
    keeper.look(30.0)
    path = place.overwrite(2.0)
    keeper.look(31.0)
    keeper.look(60.0)
    newest, times = path.read_bytes(), os.stat(path)
    directory = place.save(30)  # the newest of all is read in any case
    keeper.look(61.0)
    keeper.look(90.0)
    assert [one.copied for one in seals(place.job)] == [False, True, True]
    assert len(older) == len(newest)
    path.write_bytes(older)  # an archive that is complete, and not the one that was sealed last
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    reboot()
    assert place.keeper(*patterns).prepare(never) == str(directory)
    assert path.read_bytes() == newest


def test_without_a_reboot_both_are_taken(place: Place) -> None:
    keeper = place.keeper("*.safetensors", "out/checkpoint-*")
    keeper.prepare(never)
    other = place.base / "a.safetensors"
    other.write_bytes((2).to_bytes(8, "little") + b"{}")
    place.save(10)
    keeper.prepare(never)
    assert sorted(names(place)) == ["a.safetensors", "checkpoint-10"]
    assert place.aside == []


def test_patterns_that_an_earlier_version_noted_are_known(place: Place) -> None:
    """It noted no boot, so what is not sealed may be of any."""
    place.keeper().prepare(never)
    noted = place.job.own_seals / "watched.json"
    noted.write_text(json.dumps([str(place.base / "out/checkpoint-*")]))
    place.save(10)
    assert place.keeper().prepare(never) == ""
    assert [name for name, _ in place.aside] == ["checkpoint-10"]
    assert json.loads(noted.read_text())["boot"]
