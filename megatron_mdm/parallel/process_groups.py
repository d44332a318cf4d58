"""Process groups by their ranks: each is made once, whoever asks for it. On CUDA every group that communicates takes
memory for a communicator of its own (communicators.py)."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from megatron_mdm.parallel.single_rank import SINGLE


class ProcessGroups:
    """The groups of a job. A communicator is made when a group first communicates."""

    def __init__(self, timeout: timedelta) -> None:
        """timeout: of a collective."""
        self.timeout = timeout
        self.world = cast(dist.ProcessGroup, dist.group.WORLD)
        self.rank = dist.get_rank()
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(dist.get_world_size())): self.world}
        self._on_host: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._background: dist.ProcessGroup | None = None

    def of(self, ranks: Iterable[int]) -> dist.ProcessGroup:
        """The group of these ranks; torch's NON_GROUP_MEMBER on others. Collective over the job where a group is new:
        all ranks ask for the same groups in the same order."""
        key = tuple(sorted(ranks))
        if key not in self._made:
            self._made[key] = self._new(key)
        return self._made[key]

    def _new(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        if len(ranks) > 1:
            return cast(dist.ProcessGroup, dist.new_group(list(ranks), timeout=self.timeout))
        if ranks != (self.rank,):
            return cast(Any, dist.GroupMember.NON_GROUP_MEMBER)
        group: Any = dist.new_group(list(ranks), backend=SINGLE, use_local_synchronization=True)
        return cast(dist.ProcessGroup, group)

    def on_host(self, ranks: Iterable[int]) -> dist.ProcessGroup:
        """As of(), over gloo."""
        key = tuple(sorted(ranks))
        if len(key) == 1:
            return self.of(key)
        if key not in self._on_host:
            group = dist.new_group(list(key), timeout=self.timeout, backend="gloo")
            self._on_host[key] = cast(dist.ProcessGroup, group)
        return self._on_host[key]

    def background(self) -> dist.ProcessGroup:
        """All ranks once more, for a thread that communicates while the main one does. Collective over the job, the
        first time."""
        if self._background is None:
            alone = self.world.size() == 1
            self._background = self.world if alone else dist.new_group(timeout=self.timeout, backend="gloo")
        return cast(dist.ProcessGroup, self._background)
