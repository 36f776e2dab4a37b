"""The processes that draw one job together, as torchrun starts them; alone, a team of one.

They never exchange a tensor, so there is no process group of gloo or nccl, and none of them waits inside a collective
operation for one that died. All that they share is torchrun's key-value store: a counter from which each takes its next
chunk, so that slow ones get fewer, and a few words.
"""

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Protocol, TypeVar

from dgfast.errors import UserError
from dgfast.ranges import Ranges

T = TypeVar("T")
_CONNECTING = timedelta(minutes=5)
_POLL = 0.1  # seconds
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Store(Protocol):
    """What a team needs of `torch.distributed.Store`."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


class Team:
    """This process among those of its job.

    Attributes:
        rank: its number; 0 opens and closes the job's folder. size: processes of the job.
        local_rank: its number on its machine. node: its machine's number.
    """

    def __init__(self, store: Store, rank: int = 0, size: int = 1, local_rank: int = 0, node: int = 0) -> None:
        self._store, self.rank, self.size, self.local_rank, self.node = store, rank, size, local_rank, node

    @classmethod
    def join(cls) -> "Team":
        """The team that torchrun's environment variables tell of.

        Raises:
            UserError: the other processes cannot be reached.
        """
        if not all(name in os.environ for name in _ENVIRONMENT) or os.environ["WORLD_SIZE"] == "1":
            return cls(_Alone())
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not marked so

        try:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank, node = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("GROUP_RANK", 0))
            by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process has the store
            store = TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=rank == 0 and not by_agent,
                wait_for_workers=False, timeout=_CONNECTING,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the processes of this job do not reach each other ({reason}); start them by torchrun"
            ) from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(PrefixStore(f"dgfast/{attempt}", store), rank, size, local_rank, node)

    def tell(self, key: str, text: str) -> None:
        """Let the others know."""
        self._store.set(key, text)

    def told(self, key: str) -> str:
        """What `tell` said, waiting for it.

        Raises:
            UserError: the process that has the store is gone.
        """
        try:
            while not self._store.check([key]):  # its own waiting would not hear SIGTERM
                time.sleep(_POLL)
            return self._store.get(key).decode()
        except RuntimeError as error:
            raise UserError("the first process of this job is gone; start the job again") from error

    def count(self, key: str, more: int = 0) -> int:
        """A sum over all processes, after `more` is added to it."""
        return self._store.add(key, more)

    def shares(self, indices: Ranges) -> Iterator[int]:
        """Of these numbers, in order, those that fall to this process: the next one whenever it asks."""
        while (position := self._store.add("next", 1) - 1) < len(indices):
            yield indices[position]

    def once_a_node(self, make: Callable[[], T]) -> T:
        """Call `make` in one process of each machine, then in its others, which find what it left on the disk."""
        key = f"made on node {self.node}"
        if self.local_rank > 0:
            self.told(key)
        made = make()
        if self.local_rank == 0:
            self.tell(key, "")
        return made


class _Alone:
    """The store of a team of one."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def add(self, key: str, amount: int) -> int:
        self._values[key] = str(int(self._values.get(key, 0)) + amount)
        return int(self._values[key])

    def set(self, key: str, value: str) -> None:
        self._values[key] = value

    def get(self, key: str) -> bytes:
        return self._values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return self._values.keys() >= set(keys)
