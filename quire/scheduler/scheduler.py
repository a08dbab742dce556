"""Decides what each step computes. Pure: no tensors, no clock, no randomness, no I/O.

A step computes some positions of some sequences; prompts and outputs are not told apart. Devices carry out
plans in order, so a block or a slot may be handed to any later plan. `schedule` may run again before `commit`
has told it the sampled values: it plans with counts, and the newest token stays on the device. Drafted tokens
make the counts upper bounds until they are committed; the device knows the truth. Where a device computes steps in
stages, at the same time, plans that are in flight have no decoding sequence in common, and bring the newest tokens.
"""

from array import array
from collections.abc import Iterator
from itertools import islice

from quire.errors import ConfigError, InvalidRequest
from quire.scheduler import states
from quire.scheduler.blocks import BlockPool
from quire.scheduler.checkpoints import Checkpoints
from quire.scheduler.cost import StepCost
from quire.scheduler.holdings import Hit, Holdings
from quire.scheduler.limits import Limits
from quire.scheduler.lookups import Lookups
from quire.scheduler.plan import Emitted, Plan, Result, Start, Work
from quire.scheduler.policy import Queue, Tenants
from quire.scheduler.seats import Seats
from quire.scheduler.sequence import Holding, NewSequence, Sequence, SequenceStats, State
from quire.scheduler.sharing import Sharing
from quire.scheduler.spans import around, whole_blocks

__all__ = ["NewSequence", "Scheduler", "SequenceStats"]


class Scheduler:
    """`schedule` and `commit` in turn, or plans ahead of commits; each plan with work is committed, in order.

    Attributes:
        num_preemptions: how often a sequence lost its seat and had to be computed again.
        lookups: prompt tokens of the sequences seated so far, found and not.
        batched_tokens: positions in the latest step.
        prefill_tokens: those of them that are no sequence's newest token.
    """

    def __init__(self, pool: BlockPool, limits: Limits, *, checkpoints: Checkpoints | None = None):
        """`checkpoints`: where states are kept, if the network has recurrent layers.

        Raises:
            ConfigError: drafts, of a network that cannot take them back.
        """
        drafts = limits.drafts
        if checkpoints is not None and drafts:
            raise ConfigError(
                f"drafts is {drafts}; a recurrent state cannot take back drafted tokens, so it must be 0"
            )
        if pool.near is not None and pool.near.chunk is not None and drafts:
            raise ConfigError(f"drafts is {drafts}; of a network that sees chunks of positions it must be 0")
        self.holdings, self.limits = Holdings(pool, limits.max_batched_tokens), limits
        self.checkpoints, self.cost = checkpoints, StepCost()
        self.seqs: dict[int, Sequence] = {}
        self.queue, self.tenants, self.sharing = Queue(), Tenants(), Sharing()
        self.seats = Seats(limits.max_seqs)
        self.lookups, self.num_preemptions = Lookups(), 0
        self.batched_tokens = self.prefill_tokens = self._num_steps = 0

    @property
    def pool(self) -> BlockPool:
        """The cache's blocks."""
        return self.holdings.pool

    @property
    def num_running(self) -> int:
        """Sequences that have a seat."""
        return self.seats.num_taken

    @property
    def num_waiting(self) -> int:
        """Sequences that have none."""
        return len(self.seqs) - self.seats.num_taken

    @property
    def num_parked(self) -> int:
        """Of those waiting: for a block that another sequence computes."""
        return self.sharing.num_waiting

    @property
    def idle(self) -> bool:
        """Nothing waits or runs, and the device has heard of every end."""
        return not self.seqs and not self.seats.has_ends

    def add(self, new: NewSequence, now: float) -> SequenceStats:
        """Queue a sequence; what is returned is kept up to date until it ends.

        Raises:
            InvalidRequest: it can never run.
        """
        self.limits.check(new, self.holdings.room)
        if new.id in self.seqs:
            raise InvalidRequest(f"sequence id {new.id} is in use; take another one")
        seq = Sequence(
            id=new.id,
            new=new,
            tenant=self.tenants.join(new.tenant, new.share),
            rank=self.queue.rank(new.priority),
            stops=new.eos_token_ids | new.stop_token_ids,
            limit=len(new.prompt) + new.max_tokens - 1,
            tokens=array("q", new.prompt + new.output),
            stats=SequenceStats(now),
        )
        self.seqs[new.id] = seq
        self.queue.push(seq)
        return seq.stats

    def abort(self, id: int) -> None:
        """End a sequence now, even while plans with it are in flight; unknown ones are ignored."""
        if (seq := self.seqs.get(id)) is not None:
            self._finish(seq)

    def schedule(self, now: float) -> Plan:
        """Plan the next step: seats first, then running sequences' newest tokens, then prefills."""
        if not self.queue.is_empty:
            self._fill_seats(now)
        work: list[Work] = []
        starts: list[Start] = []
        self.batched_tokens = self._plan_decodes(work)
        self.prefill_tokens = self._plan_prefills(work, starts) if self.seats.prefilling else 0
        self.batched_tokens += self.prefill_tokens
        ends = self.seats.collect_ends()
        if work or ends:
            self._num_steps += 1
        if work:
            self.cost.begin(self._num_steps, self.batched_tokens, now)
        beside = self.holdings.collect() if work else ()
        return Plan(self._num_steps, tuple(work), tuple(starts), ends, beside)

    def commit(self, plan: Plan, result: Result, now: float) -> list[Emitted]:
        """Learn what a plan sampled. Sequences in `result.errors` end without another token."""
        self.cost.end(plan.step, now)
        seqs = self.seqs
        emitted: list[Emitted] = []
        for id, error in result.errors.items():
            if (seq := seqs.get(id)) is not None:
                self.holdings.forget(seq.kv)  # what they hold may be why it failed
                if self.checkpoints is not None:
                    self.checkpoints.forget(seq.kv.keys)
                self._finish(seq)
                emitted.append(Emitted(id, None, "error", error=error))
        for w, tokens in zip(plan.work, result.tokens, strict=True):
            if (seq := seqs.get(w.seq)) is None:
                continue  # ended while this ran
            if w.samples:
                seq.pending -= w.drafts + 1
                seq.tokens.extend(tokens)
            if w.seq in result.lost and w.epoch == seq.epoch:
                self._preempt(seq)
            elif w.epoch != seq.epoch:
                if seq.state is State.RETURNING and not seq.pending:
                    self._enqueue(seq)
            elif w.samples:
                seq.planned -= w.drafts + 1 - len(tokens)
                if len(seq.tokens) > seq.kv.next_full:
                    self._publish(seq, len(seq.tokens) - 1)
            elif w.start + w.count >= seq.kv.next_full:
                self._publish(seq, w.start + w.count)
            if len(tokens) == 1 and tokens[0] not in seq.stops and len(seq.tokens) <= seq.limit:
                emitted.append(Emitted(w.seq, tokens[0]))
            elif tokens:
                self._emit(seq, tokens, emitted)
        return emitted

    def _emit(self, seq: Sequence, tokens: tuple[int, ...], emitted: list[Emitted]) -> None:
        """Hand out tokens up to the sequence's last; drafts accepted beyond that are dropped."""
        num_outputs = len(seq.tokens) - len(tokens) - len(seq.new.prompt)
        for num, token in enumerate(tokens, num_outputs + 1):
            finish, stop = None, None
            if token in seq.stops and num >= seq.new.min_tokens:
                finish, stop = "stop", None if token in seq.new.eos_token_ids else token
            elif num == seq.new.max_tokens:
                finish = "length"
            emitted.append(Emitted(seq.id, token, finish, stop))
            if finish:
                self._finish(seq)
                return

    # Seats

    def _fill_seats(self, now: float) -> None:
        """Seat waiting sequences while the step has room for their prefills."""
        seats = self.seats
        decodes = self._turn
        share = self._prefill_share(decodes + min(decodes * self.limits.drafts, self._draft_room(True)))
        while (seq := self.queue.first()) is not None:
            priority = seq.rank[0]
            if seats.is_full and seats.worst.rank[0] <= priority:
                break
            ahead = sum(s.num_to_prefill for s in seats.prefilling if s.rank[0] <= priority)
            if ahead and ahead >= share:
                break
            hit, key = self._lookup(seq)
            if key is not None:
                self.queue.remove(seq)
                seq.state = State.PARKED
                self.sharing.park(seq, key)
            elif not seats.is_full and self._num_lacking(seq, hit) <= 0:
                self.queue.remove(seq)
                self._seat(seq, hit, now)
            elif not self._make_way(seq, hit):
                break

    def _lookup(self, seq: Sequence) -> tuple[Hit, bytes | None]:
        """Blocks that hold the sequence's beginning, and the key to wait for if others compute more of it."""
        if not seq.new.read_cache:
            return Hit(), None
        last = self._num_reusable(seq)
        self._extend_keys(seq, last)
        hit = self.holdings.find(seq.kv.keys[:last])
        num = self.sharing.num_awaited(seq, len(hit.blocks), last)
        num = whole_blocks(seq.new.spans, num, self.pool.block_size)
        key = seq.kv.keys[num - 1] if num > len(hit.blocks) else None
        if self.checkpoints is not None and key is not None:
            key = key if states.will_keep(self.sharing.owner(key), num, self.pool.block_size) else None
        while (taken := self._num_taken_over(seq, len(hit.blocks))) < len(hit.blocks):
            hit = self.holdings.find(seq.kv.keys[:taken])
        return hit, key

    def _num_taken_over(self, seq: Sequence, num_found: int) -> int:
        """The most of the blocks found after which a sequence can begin."""
        num = whole_blocks(seq.new.spans, num_found, self.pool.block_size)
        return num if self.checkpoints is None else self.checkpoints.find(seq.kv.keys[:num])

    def _num_reusable(self, seq: Sequence) -> int:
        """Blocks that might be found: at least one position is left to compute, and no part of a span."""
        size = self.pool.block_size
        return whole_blocks(seq.new.spans, (len(seq.tokens) - 1) // size, size)

    def _extend_keys(self, seq: Sequence, num: int) -> None:
        new = seq.new
        self.pool.extend_keys(seq.kv.keys, new.cache_root, seq.tokens, num, new.coordinates, new.spans)

    def _num_lacking(self, seq: Sequence, hit: Hit) -> int:
        """Blocks to be freed before the sequence may have a seat; none when it would be alone."""
        needed = self.holdings.num_needed(hit, len(seq.tokens))
        return needed + self.seats.num_taken * self._headroom - self.pool.num_free

    @property
    def _headroom(self) -> int:
        """Blocks kept free for the next outputs of each running sequence."""
        return self.pool.blocks_for(1 + self.limits.drafts) * (1 + self.holdings.parts)

    def _seat(self, seq: Sequence, hit: Hit, now: float) -> None:
        """Let a sequence run on the blocks found and new ones for its known tokens."""
        pool, kv, size = self.pool, seq.kv, self.pool.block_size
        if seq.stats.seated_s is None:
            seq.stats.seated_s = now
            # Before it takes blocks that might have held more.
            there = hit if self.checkpoints is None else self.holdings.find(kv.keys)
            self.lookups.count(seq, pool, self.sharing, len(hit.blocks), len(there.blocks))
        self.holdings.seat(kv, hit, len(seq.tokens))
        kv.num_published = len(hit.blocks)
        seq.planned = kv.num_published * size
        kv.next_full = seq.planned + size
        num_full = len(seq.tokens) // size
        self._extend_keys(seq, num_full)
        self.sharing.claim(seq, num_full)
        if self.checkpoints is not None:
            states.place_cuts(seq, self.checkpoints, pool, self._num_reusable(seq))
        self.seats.enter(seq)
        # At once, so that the next seat goes to another tenant.
        seq.tenant.served += seq.num_to_prefill * seq.tenant.price

    def _make_way(self, seq: Sequence, hit: Hit) -> bool:
        """Preempt sequences of lower priority, the worst first, if that makes room; whether it does."""
        lacking, holders, kept = self._num_lacking(seq, hit), dict[int, int](), set(self.holdings.held(hit))
        victims: list[Sequence] = []
        for victim in self.seats.worse_than(seq.rank[0]):
            victims.append(victim)
            lacking -= self._headroom
            for block in self.holdings.held(victim.kv):
                holders[block] = holders.get(block, self.pool.refs[block]) - 1
                lacking -= not holders[block] and block not in kept
            if lacking <= 0:
                break
        else:
            return False
        for victim in victims:
            self._preempt(victim)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take a sequence's seat and blocks away; it computes its tokens again later."""
        self._vacate(seq)
        seq.epoch += 1
        seq.stats.num_preemptions += 1
        self.num_preemptions += 1
        if seq.pending:
            seq.state = State.RETURNING  # the device forgets its newest token: wait until the host knows it
        else:
            self._enqueue(seq)

    def _finish(self, seq: Sequence) -> None:
        if seq.state is State.QUEUED:
            self.queue.remove(seq)
        elif seq.state is State.PARKED:
            self.sharing.leave(seq)
        elif seq.state is not State.RETURNING:
            self._vacate(seq)
        seq.state = State.FINISHED
        self.tenants.leave(seq.tenant)
        del self.seqs[seq.id]

    def _vacate(self, seq: Sequence) -> None:
        if seq.state is State.PREFILLING:
            seq.tenant.served -= seq.num_to_prefill * seq.tenant.price
        self.seats.leave(seq)
        self._settle(seq, seq.kv.num_published, seq.kv.num_claimed)
        self.holdings.release(seq.kv)
        if self.checkpoints is not None:
            states.release(seq.kv, self.checkpoints)
        seq.kv, seq.planned = Holding(keys=seq.kv.keys), 0

    def _enqueue(self, seq: Sequence) -> None:
        seq.state = State.QUEUED
        self.queue.push(seq)

    def _settle(self, seq: Sequence, first: int, last: int) -> None:
        """Wake those who wait for these blocks of the sequence."""
        for waiter in self.sharing.settle(seq, first, last):
            self._enqueue(waiter)

    def _publish(self, seq: Sequence, num_computed: int) -> None:
        """Make the blocks findable that computed positions have filled."""
        kv, size = seq.kv, self.pool.block_size
        first, full = kv.num_published, num_computed // size
        self._extend_keys(seq, full)
        self.holdings.publish(kv, first, full)
        if self.checkpoints is not None:
            states.publish(kv, self.checkpoints, full)
        kv.num_published, kv.next_full = full, (full + 1) * size
        self._settle(seq, first, full)

    # Work

    def _draft_room(self, prefilling: bool) -> int:
        """Positions of a step that drafts may have: none that a sequence needs, and half beside a prefill."""
        spare = self.limits.max_batched_tokens - self.limits.max_seqs
        return spare // 2 if prefilling else spare

    def _prefill_share(self, num_decodes: int) -> int:
        """Positions of a step that prefills may have beside those of decoding sequences."""
        limits = self.limits
        left = limits.max_batched_tokens - num_decodes
        if num_decodes and limits.max_gap_s is not None:
            seconds = (1 + limits.min_prefill_time) * self.cost.least(num_decodes)
            most = self.cost.most_tokens(max(limits.max_gap_s / limits.stages, seconds))
            if most is not None:
                left = min(left, max(most - num_decodes, limits.min_prefill_tokens))
        return left

    @property
    def _turn(self) -> int:
        """How many decoding sequences a step plans: one of as many parts as there are stages."""
        return -(-len(self.seats.decoding) // self.limits.stages)

    def _ready(self) -> Iterator[Sequence]:
        """Decoding sequences whose newest token the host knows, as many as it is the turn of."""
        return islice((seq for seq in self.seats.decoding if not seq.pending), self._turn)

    def _plan_decodes(self, work: list[Work]) -> int:
        """Plan the newest token of those whose turn it is, and drafts after it; return how many positions."""
        most, total, staged = self.limits.drafts, 0, self.limits.stages > 1
        room = self._draft_room(bool(self.seats.prefilling)) if most else 0
        # Preempting shortens the list, but only from its end.
        for seq in self._ready() if staged else self.seats.decoding:
            start, capacity = seq.planned, seq.kv.capacity
            if start >= seq.limit:
                continue  # its last token is on its way
            drafts = min(most, room, seq.limit - start - 1) if room else 0
            new_blocks: tuple[int, ...] = ()
            if start + drafts >= capacity:
                end = start + 1 + drafts
                if drafts and self.holdings.num_lacking(seq.kv, end, end) > self.pool.num_free:
                    drafts = max(capacity - start - 1, 0)  # nobody is preempted for a guess
                if start + drafts >= capacity:
                    if (extended := self._extend(seq, start + 1 + drafts)) is None:
                        continue
                    new_blocks = extended
            exact = not most or not seq.pending
            seq.planned = start + 1 + drafts
            seq.pending += 1 + drafts
            seq.tenant.served += seq.tenant.price
            room -= drafts
            total += 1 + drafts
            save = -1 if self.checkpoints is None else self._keep(seq, start + 1)
            token = seq.tokens[-1] if staged else -1
            work.append(
                Work(seq.id, seq.slot, seq.epoch, start, exact, 1, drafts, new_blocks, True, save, token)
            )
        return total

    def _extend(self, seq: Sequence, num_positions: int) -> tuple[int, ...] | None:
        """Hold blocks for so many positions; None if the sequence itself was preempted for them."""
        holdings, kv = self.holdings, seq.kv
        holdings.give_up(kv, len(seq.tokens) - 1)
        while holdings.num_lacking(kv, num_positions, num_positions) > self.pool.num_free:
            victim = self.seats.worst
            self._preempt(victim)
            if victim is seq:
                return None
        return holdings.extend(kv, num_positions, num_positions)

    def _go_on(self, seq: Sequence, count: int) -> tuple[int, ...] | None:
        """Hold near blocks for the next `count` positions of a prefill, or more, in place of those before.

        None if it has to wait.

        Who decodes is planned already and keeps what it has, so only prefills that come later make way.
        """
        holdings, kv, num_tokens, least = self.holdings, seq.kv, len(seq.tokens), seq.planned + count
        holdings.give_up(kv, seq.planned)
        while holdings.num_lacking(kv, num_tokens, least) > self.pool.num_free:
            if (victim := self.seats.prefilling[-1]) is seq:
                return None
            self._preempt(victim)
        return holdings.extend(kv, num_tokens, least)

    def _plan_prefills(self, work: list[Work], starts: list[Start]) -> int:
        """Plan known tokens, the best sequence's first; return how many positions."""
        left = share = self._prefill_share(self.batched_tokens)
        for seq in tuple(self.seats.prefilling):
            if left <= 0:
                break
            if seq.state is not State.PREFILLING:
                continue  # it made way
            start, new_blocks = seq.planned, tuple[int, ...]()
            span = around(seq.new.spans, start + 1)  # one that begins here, which is computed at once
            least = 1 if span is None else span[1] - start
            most = max(left, least) if left == share else left  # nobody waits for ever
            if most < least:
                continue
            if start + most > seq.kv.capacity < len(seq.tokens):
                if (extended := self._go_on(seq, least)) is None:
                    continue
                new_blocks = extended
            count = self._cut(seq, min(seq.num_to_prefill, most, seq.kv.capacity - start))
            save = self._keep(seq, start + count)
            if seq.slot < 0:
                self.seats.take_slot(seq)
                new, tokens, restore = seq.new, tuple(seq.tokens), seq.kv.restore
                known = Start(
                    seq.id, seq.slot, tokens, len(seq.new.prompt), restore, new.coordinates, new.spans
                )
                starts.append(known)
                states.let_go_of_restored(seq.kv, self.checkpoints)
                new_blocks = tuple(seq.kv.blocks)
            seq.planned += count
            left -= count
            samples = not seq.num_to_prefill
            work.append(Work(seq.id, seq.slot, seq.epoch, start, True, count, 0, new_blocks, samples, save))
            if samples:
                seq.pending = 1
                self.seats.decode(seq)
        return share - left

    def _cut(self, seq: Sequence, count: int) -> int:
        """Positions to compute of `count` that could be: up to where something ends, and through no part of a span."""
        start = seq.planned
        if self.pool.near is not None and (chunk := self.pool.near.chunk) is not None:
            count = min(count, chunk - start % chunk)
        if self.checkpoints is not None and self.checkpoints.refs:
            count = states.until_cut(seq, count, self.pool.block_size)
        if (span := around(seq.new.spans, start + count)) is not None:
            return (span[0] if span[0] > start else span[1]) - start
        return count

    def _keep(self, seq: Sequence, num_positions: int) -> int:
        return states.keep(seq.kv, self.checkpoints, num_positions, self.pool.block_size)
