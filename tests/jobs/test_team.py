"""The processes of one job: each chunk falls to one of them, and a machine compiles once."""

import threading
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch's list of names lacks it

from dgfast.errors import UserError
from dgfast.ranges import Ranges
from dgfast.team import Team


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_a_process_is_a_team_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "1"):
        if size is not None:
            for name, value in {"RANK": "0", "WORLD_SIZE": size, "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
                monkeypatch.setenv(name, value)
        team = Team.join()
        assert (team.rank, team.size, team.local_rank) == (0, 1, 0)
        assert list(team.shares(Ranges.parse("3-5,9"))) == [3, 4, 5, 9]
        team.tell("plan", "word")
        assert team.told("plan") == "word" and team.count("images", 3) == 3 and team.count("images") == 3
        assert team.once_a_node(lambda: 7) == 7


def test_a_slow_process_gets_fewer_chunks_and_none_is_lost() -> None:
    store = HashStore()
    fast, slow = (Team(store, rank, 2).shares(Ranges([(0, 9)])) for rank in (0, 1))
    first = next(slow)
    assert [first, *fast, *slow] == list(range(10)) and first == 0


def test_one_process_of_a_machine_compiles_before_the_others() -> None:
    store, order, compiling = HashStore(), [], threading.Event()
    teams = [Team(store, rank, 4, local_rank=rank % 2, node=rank // 2) for rank in range(4)]

    def make(rank: int) -> None:
        if rank == 0:
            assert compiling.wait(10)
        order.append(rank)

    threads = [
        threading.Thread(target=teams[rank].once_a_node, args=(lambda rank=rank: make(rank),)) for rank in (1, 0)
    ]
    for thread in threads:
        thread.start()
    teams[2].once_a_node(lambda: order.append(2))  # another machine does not wait
    teams[3].once_a_node(lambda: order.append(3))
    compiling.set()
    for thread in threads:
        thread.join(10)
    assert order == [2, 3, 0, 1]


def test_a_team_whose_first_process_is_gone_says_so() -> None:
    class Gone:
        def check(self, keys: Any) -> bool:
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(UserError, match="the first process of this job is gone"):
        Team(Gone(), 1, 2).told("plan")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("MASTER_PORT", "x"), ("RANK", "one")], ids=["no port", "no rank"])
def test_a_broken_environment_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    good = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, content in {**good, name: value}.items():
        monkeypatch.setenv(key, content)
    with pytest.raises(UserError, match="do not reach each other"):
        Team.join()
