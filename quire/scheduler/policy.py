"""Who is next: by priority, then the tenant served least, then first come. Knows no blocks and no budget.

Tenants share by virtual time (Sheng et al. 2024, "Fairness in Serving Large Language Models"): tokens
computed for them, over their shares. One that comes back starts no lower than the least of those that stayed:
being away saves nothing up.
"""

from bisect import bisect_left, insort

from quire.scheduler.sequence import BY_RANK, Sequence, Tenant


class Tenants:
    """Virtual times, kept for tenants with sequences and for those ahead of them."""

    def __init__(self) -> None:
        self._by_name: dict[str, Tenant] = {}

    def join(self, name: str, share: float = 1.0) -> Tenant:
        """The tenant, with one sequence more. `share` is above 0, and holds from now on."""
        tenant = self._by_name.get(name)
        if tenant is None or not tenant.num_sequences:
            least = min((t.served for t in self._by_name.values() if t.num_sequences), default=None)
            self._forget(least)
            tenant = self._by_name.setdefault(name, Tenant(name, least or 0.0))
        tenant.price = 1 / share
        tenant.num_sequences += 1
        return tenant

    def leave(self, tenant: Tenant) -> None:
        """One of its sequences has ended."""
        tenant.num_sequences -= 1

    def _forget(self, least: float | None) -> None:
        """Drop absent tenants that have nothing to make up for."""
        absent = [t for t in self._by_name.values() if not t.num_sequences]
        for tenant in absent:
            if least is None or tenant.served <= least:
                del self._by_name[tenant.name]


class Queue:
    """Sequences that wait for a seat."""

    def __init__(self) -> None:
        self._num_arrivals = 0
        self._priorities: list[int] = []  # those in `_waiting`, ascending
        self._waiting: dict[
            int, dict[Tenant, list[Sequence]]
        ] = {}  # by priority and tenant, in order of arrival

    @property
    def is_empty(self) -> bool:
        """Nobody waits for a seat."""
        return not self._priorities

    def rank(self, priority: int) -> tuple[int, int]:
        """The place of a sequence that arrives now: whatever becomes of it, it keeps that."""
        self._num_arrivals += 1
        return priority, self._num_arrivals

    def push(self, seq: Sequence) -> None:
        """Add a sequence at the place its arrival gives it."""
        priority = seq.rank[0]
        if priority not in self._waiting:
            insort(self._priorities, priority)
            self._waiting[priority] = {}
        insort(self._waiting[priority].setdefault(seq.tenant, []), seq, key=BY_RANK)

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that waits."""
        priority = seq.rank[0]
        tenants = self._waiting[priority]
        line = tenants[seq.tenant]
        del line[bisect_left(line, seq.rank, key=BY_RANK)]
        if not line:
            del tenants[seq.tenant]
        if not tenants:
            del self._waiting[priority]
            self._priorities.remove(priority)

    def first(self) -> Sequence | None:
        """The next to be seated; it stays."""
        if not self._priorities:
            return None
        lines = self._waiting[self._priorities[0]].values()
        return min((line[0] for line in lines), key=lambda seq: (seq.tenant.served, seq.rank))
