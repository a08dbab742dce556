"""A simulated device. Its KV remembers the prefix that wrote it, so a stale or stolen block is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from zlib import crc32

from quire.scheduler.blocks import BlockPool
from quire.scheduler.checkpoints import Checkpoints
from quire.scheduler.limits import Limits
from quire.scheduler.near import Near
from quire.scheduler.plan import Plan, Result, Start, Work
from quire.scheduler.sequence import NewSequence
from quire.scheduler.spans import Spans

EOS, STOP, VOCAB = 7, 8, 11
SECRET = b"tests"
LAST_LOSS = 100  # step: who begins again again and again never ends


class Prefix:
    """Tokens from a root; equal ones are one object."""

    __slots__ = ("children", "mix", "parent", "token")

    def __init__(self, parent: Prefix | None, token: int):
        self.parent, self.token = parent, token
        self.mix = ((parent.mix if parent else 1) * 1_000_003 + token * 7919 + 12345) % (2**61 - 1)
        self.children: dict[int, Prefix] = {}

    def then(self, token: int) -> Prefix:
        if token not in self.children:
            self.children[token] = Prefix(self, token)
        return self.children[token]


def first_seen(near: Near, position: int) -> int:
    """The earliest position that one sees in near layers."""
    window, chunk = near.window or 0, near.chunk or position + 1
    in_chunk = 0 if near.chunk is None else position % chunk + 1
    return min(position, position + 1 - max(min(window, position + 1), in_chunk))


def spans_of(prompt: tuple[int, ...], tokens: frozenset[int]) -> Spans:
    """Runs of these tokens."""
    found: list[tuple[int, int]] = []
    for is_one, run in groupby(range(len(prompt)), lambda p: prompt[p] in tokens):
        first, *rest = run
        if is_one and rest:
            found.append((first, rest[-1] + 1))
    return tuple(found)


def seen_ahead(prompt: tuple[int, ...], spans: Spans) -> dict[int, int]:
    """Instead of tokens: what positions of spans know of all of theirs."""
    return {
        p: VOCAB + crc32(repr((p - start, prompt[start:end])).encode())
        for start, end in spans
        for p in range(start, end)
    }


class Model:
    """A deterministic language model, and a drafter that is right most of the time, or never."""

    def __init__(self, *, good_drafts: bool = True) -> None:
        self.good_drafts = good_drafts
        self.roots: dict[bytes, Prefix] = {}

    def root(self, name: bytes) -> Prefix:
        return self.roots.setdefault(name, Prefix(None, int.from_bytes(name, "big")))

    def sample(self, prefix: Prefix, seed: int) -> int:
        return (prefix.mix ^ seed * 2_654_435_761) % 1_000_033 % VOCAB

    def draft(self, prefix: Prefix, seed: int) -> int:
        if not self.good_drafts:
            return VOCAB
        return self.sample(prefix, seed) if prefix.mix % 3 else 0

    def answer(self, new: NewSequence, seed: int) -> tuple[list[int], str, int | None]:
        """What the sequence must give: tokens, the reason of its end, and the stop token if one was it."""
        prefix, outputs = self.root(new.cache_root), list[int]()
        ahead = seen_ahead(new.prompt, new.spans)
        for p, token in enumerate(new.prompt):
            prefix = prefix.then(ahead.get(p, token))
        while True:
            outputs.append(token := self.sample(prefix, seed))
            prefix = prefix.then(token)
            if len(outputs) >= new.min_tokens and token in new.eos_token_ids:
                return outputs, "stop", None
            if len(outputs) >= new.min_tokens and token in new.stop_token_ids:
                return outputs, "stop", token
            if len(outputs) == new.max_tokens:
                return outputs, "length", None


@dataclass
class Slot:
    seq: int
    tokens: list[int]
    table: list[int] = field(default_factory=list)
    known: int = 0  # tokens, to a first stage, which samples none
    computed: int = -1  # positions; -1 before the first work
    state: Prefix | None = None  # of a network that keeps states: what it has seen
    lost: bool = False  # its state means nothing any more
    ahead: dict[int, int] = field(default_factory=dict)  # as `seen_ahead`
    spans: Spans = ()

    def seen(self, position: int) -> int:
        return self.ahead.get(position, self.tokens[position])


@dataclass
class Device:
    """Runs plans in order; `fails` maps sequences to the output whose sampling fails. Times are simulated."""

    model: Model
    limits: Limits
    block_size: int
    sequences: dict[int, NewSequence]
    seeds: dict[int, int]
    fails: dict[int, int] = field(default_factory=dict)
    step_s: Callable[[int], float] = lambda tokens: 0.01 + 0.001 * tokens
    now: float = 0.0
    busy_until: float = 0.0
    slots: dict[int, Slot] = field(default_factory=dict)
    memory: dict[tuple[int, int], tuple[Prefix, int]] = field(default_factory=dict)
    near: Near | None = None  # how layers see that do not see all positions
    beside: dict[int, tuple[int, ...]] = field(default_factory=dict)  # a block's, for those layers
    rows: dict[int, tuple[Prefix, int]] | None = None  # states that were kept; None: the network has none
    lose_every: int = 0  # steps, of which each such one loses a sequence's state
    num_committed: int = 0  # the latest step whose result was asked for
    num_launched: int = 0
    ended: dict[int, int] = field(default_factory=dict)  # sequences whose last token is sampled: rows since
    meaning: dict[bytes, Prefix] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def launch(self, plan: Plan) -> None:
        assert plan.step == self.num_launched + 1, "plans are numbered in order"
        self.num_launched = plan.step
        self.plans.append(plan)
        for slot in plan.ends:
            del self.slots[slot]
        for start in plan.starts:
            self._start(start)
        self.beside |= {block: tuple(near) for block, *near in plan.beside}
        num_tokens = sum(w.count + w.drafts for w in plan.work)
        assert num_tokens <= self.limits.max_batched_tokens
        assert len({w.seq for w in plan.work}) == len(plan.work)
        self.errors: dict[int, str] = {}
        losing = self.lose_every and plan.step % self.lose_every == 0 and plan.step < LAST_LOSS
        if losing and plan.work:
            self.slots[plan.work[plan.step % len(plan.work)].slot].lost = True
        self.computing: list[tuple[Slot, int, int]] = []
        self.sampled = tuple(tuple(self._run(w)) for w in plan.work)
        for slot, start, end in self.computing:  # a step's sequences are computed at once
            self._read(slot, start, end)
        if plan.work:
            self.busy_until = max(self.now, self.busy_until) + self.step_s(num_tokens)

    def sample(self, plan: Plan) -> Callable[[], Result]:
        lost = frozenset(w.seq for w in plan.work if self.slots[w.slot].lost)
        result, done = Result(self.sampled, self.errors, lost), self.busy_until

        def wait() -> Result:
            assert plan.step > self.num_committed, "results are asked for in order, once"
            self.num_committed, self.now = plan.step, max(self.now, done)
            return result

        return wait

    def _start(self, start: Start) -> None:
        new = self.sequences[start.seq]
        assert 0 <= start.slot < self.limits.max_seqs
        assert start.slot not in self.slots, "the slot is in use"
        assert start.seq not in {slot.seq for slot in self.slots.values()}, "a sequence has one slot"
        assert start.tokens[: start.prompt_len] == new.prompt
        outputs = start.tokens[start.prompt_len :]
        assert outputs[: len(new.output)] == new.output, "outputs that it brought are lost"
        self.slots[start.slot] = slot = Slot(start.seq, list(start.tokens), known=len(start.tokens))
        slot.spans, slot.ahead = start.spans, seen_ahead(new.prompt, start.spans)
        assert self.rows is not None or start.restore < 0
        if self.rows is not None:
            slot.state = self.model.root(new.cache_root) if start.restore < 0 else self.rows[start.restore][0]

    def _run(self, w: Work) -> list[int]:
        slot, new = self.slots[w.slot], self.sequences[w.seq]
        assert slot.seq == w.seq
        slot.table += w.new_blocks
        if slot.computed < 0:
            slot.computed = w.start
            assert w.exact
        start = slot.computed
        assert start == w.start if w.exact else start <= w.start
        end = start + w.count
        assert w.count > 0 and end <= len(slot.tokens), "computes a token nobody knows"
        if self.limits.stages > 1:
            slot.known = max(slot.known, start + (w.token >= 0))
            assert end <= slot.known and w.token in (-1, slot.tokens[start]), (
                "computes a token it was not told"
            )
        else:
            assert w.token == -1, "is told what it knows"
        assert w.start + w.count + w.drafts <= min(
            len(new.prompt) + new.max_tokens - 1, len(slot.table) * self.block_size
        ), "computes a position that nobody reads, or that has no place"
        assert w.samples == (end == len(slot.tokens))
        assert w.samples or not w.drafts
        if w.seq in self.ended:
            self.ended[w.seq] += 1
        if slot.lost:
            slot.computed = end
            slot.tokens += [VOCAB] * w.samples
            return []
        inside = any(s < at < stop for s, stop in slot.spans for at in (start, end))
        assert not inside, "a step begins or ends in a span"
        prefix = self._read(slot, start, start)
        self.computing.append((slot, start, end))
        for p in range(start, end):
            prefix = self._write(slot, p, prefix.then(slot.seen(p)))
        self._advance(w, slot, start, prefix)
        slot.computed = end
        return self._sample(w, slot, prefix) if w.samples else []

    def _read(self, slot: Slot, start: int, end: int) -> Prefix:
        """What positions start .. end - 1 see, and they themselves, is there; returns the prefix up to `end`."""
        near, prefix = self.near, self.model.root(self.sequences[slot.seq].cache_root)
        if near is not None and near.chunk is not None and end > start:
            assert (end - 1) // near.chunk == start // near.chunk, "a step crosses the end of a chunk"
        for p in range(end):
            prefix, block = prefix.then(slot.seen(p)), slot.table[p // self.block_size]
            seen = [block] if near is None or near.parts else []
            if near is not None and p >= first_seen(near, start):
                seen += self.beside[block] if near.parts else [block]
            for one in seen:
                assert self.memory[one, p % self.block_size][0] is prefix, "wrong or overwritten KV"
        return prefix

    def _advance(self, w: Work, slot: Slot, start: int, prefix: Prefix) -> None:
        """The state goes on from where it was, and is kept."""
        assert self.rows is not None or w.save < 0
        if self.rows is None:
            return
        seen, state = prefix, slot.state
        for _ in range(w.count):
            assert seen.parent is not None
            seen = seen.parent
        assert state is seen, f"the state at {start} is another's"
        slot.state = prefix
        if w.save >= 0:
            assert w.save >= self.limits.max_seqs, "a slot's own row"
            self.rows[w.save] = prefix, self.num_launched

    def _sample(self, w: Work, slot: Slot, prefix: Prefix) -> list[int]:
        new, seed, sampled = self.sequences[w.seq], self.seeds[w.seq], []
        sampled.append(self.model.sample(prefix, seed))
        guess, accepted = prefix, True
        for _ in range(w.drafts):
            draft = self.model.draft(guess, seed)
            guess = guess.then(draft)
            position = slot.computed + len(sampled) - 1 if accepted else slot.computed + w.drafts - 1
            self._write(slot, position, guess)
            accepted = accepted and draft == sampled[-1]
            if accepted:
                sampled.append(self.model.sample(guess, seed))
        slot.computed += len(sampled) - 1
        slot.tokens += sampled
        num_outputs = len(slot.tokens) - len(new.prompt)
        outputs, _, _ = self.model.answer(new, seed)
        if 0 < self.fails.get(w.seq, 0) <= min(num_outputs, len(outputs)):
            self.errors[w.seq] = "the simulated device failed"
        if num_outputs >= len(outputs):
            self.ended.setdefault(w.seq, 0)
        return [] if w.seq in self.errors else sampled

    def _write(self, slot: Slot, position: int, prefix: Prefix) -> Prefix:
        block = slot.table[position // self.block_size]
        beside = self.beside[block] if self.near is not None and self.near.parts else ()
        for one in (block, *beside):
            self.memory[one, position % self.block_size] = prefix, self.num_launched
        return prefix

    def check_findable(self, pool: BlockPool) -> None:
        """A findable block is full, was written by committed plans, and means what it always meant."""
        for key, block in pool.by_key.items():
            entries = [self.memory[block, i] for i in range(self.block_size)]
            assert all(step <= self.num_committed for _, step in entries), "findable before its commit"
            assert all(b.parent is a for (a, _), (b, _) in zip(entries, entries[1:], strict=False))
            last = entries[-1][0]
            assert self.meaning.setdefault(key, last) is last, "a key with two meanings"
            for part in range(self.near.parts if self.near else 0):
                beside = pool.by_key.get(key + bytes([part]))
                assert beside is None or self.beside[block][part] == beside, (
                    "beside another block of this key"
                )

    def check_states(self, checkpoints: Checkpoints) -> None:
        """A findable state was kept by a committed plan, and is that of the blocks up to its key's."""
        assert self.rows is not None
        for key, row in checkpoints.by_key.items():
            prefix, step = self.rows[row]
            assert step <= self.num_committed, "findable before its commit"
            assert self.meaning.setdefault(key, prefix) is prefix, "another state than its key's"
