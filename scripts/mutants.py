"""Plants bugs in a copy of the scheduler, one at a time, and runs its tests: the test of the tests.

    python scripts/mutants.py [WORD ...]     only bugs whose file or description has one of the words

Exits with 1 if a bug survives.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "quire" / "scheduler"
MAX_S = 600  # of the tests without a bug
LAST = ("test_scheduler.py", "test_trace.py")  # the slow ones, which most bugs do not reach
CONFIG = """[pytest]
pythonpath = .
addopts = --import-mode=importlib -p no:cacheprovider
markers =
    slow: left out
"""
CONFTEST = """from hypothesis import Phase, settings

settings.register_profile("mutants", phases=(Phase.generate,))  # nobody reads the examples: do not shrink
settings.load_profile("mutants")
"""


@dataclass(frozen=True)
class Mutant:
    """A bug: in `file`, `old`, which occurs once, is replaced by `new`."""

    file: str
    old: str
    new: str
    what: str


SCHEDULER = [
    ("seq.epoch += 1", "seq.epoch += 0", "a preempted sequence keeps its epoch"),
    ("if w.epoch != seq.epoch:", "if False:", "results of an older epoch claim KV"),
    (
        "        if seq.pending:\n            seq.state = State.RETURNING",
        "        if False:\n            seq.state = State.RETURNING",
        "a preempted sequence is seated while its newest token is in flight",
    ),
    ("(len(seq.tokens) - 1) // size, size)", "len(seq.tokens) // size, size)", "a whole prompt is matched"),
    ("        self.holdings.release(seq.kv)\n", "", "blocks leak"),
    ("Holding(keys=seq.kv.keys), 0", "Holding(keys=seq.kv.keys), seq.planned", "planned survives preemption"),
    ("Holding(keys=seq.kv.keys), 0", "Holding(keys=seq.kv.keys[1:]), 0", "keys shift when blocks are lost"),
    (
        "first, full = kv.num_published, num_computed // size",
        "first, full = kv.num_published, min(-(-num_computed // size), len(kv.keys), len(kv.blocks))",
        "a block is published before it is full",
    ),
    (
        "self._publish(seq, len(seq.tokens) - 1)",
        "self._publish(seq, min(len(seq.tokens), seq.kv.capacity))",
        "a block is published though its last position is not computed",
    ),
    (
        "            seq.planned += count\n",
        "            seq.planned += count\n            self._publish(seq, seq.planned)\n",
        "a block is findable before the commit that fills it",
    ),
    ("seq.planned -= w.drafts + 1 - len(tokens)", "pass", "rejected drafts stay planned"),
    ("seq.pending -= w.drafts + 1", "seq.pending -= 1", "rejected drafts stay pending"),
    ("exact = not most or not seq.pending", "exact = True", "a bound is passed off as the truth"),
    (
        "seats.decoding if not seq.pending)",
        "seats.decoding)",
        "a sequence is planned whose token is at another stage",
    ),
    ("// self.limits.stages)", "// 1)", "all stages but one have nothing to compute"),
    ("token = seq.tokens[-1] if", "token = seq.tokens[0] if", "the first stage is told an old token"),
    (
        "limits.max_gap_s / limits.stages",
        "limits.max_gap_s",
        "a token's steps of all stages are one to its gap",
    ),
    ("if start >= seq.limit:", "if start > seq.limit:", "a position is computed that nobody reads"),
    ("seq.limit - start - 1)", "seq.limit - start)", "drafts reach beyond the last token"),
    ("return spare // 2 if prefilling else spare", "return spare", "drafts starve prefills"),
    ("room -= drafts", "pass", "drafts exceed the step"),
    ("drafts = max(capacity - start - 1, 0)", "pass", "sequences are preempted for a guess"),
    (
        "                    new_blocks = extended\n            exact",
        "            exact",
        "the device does not hear of a new block",
    ),
    (
        "                new_blocks = extended\n            count",
        "            count",
        "nor of a prefill's new block",
    ),
    (
        "new_blocks = tuple(seq.kv.blocks)",
        "new_blocks = tuple(seq.kv.blocks[:1])",
        "a start brings one block",
    ),
    (
        "min(seq.num_to_prefill, most, seq",
        "min(seq.num_to_prefill, seq",
        "prefills exceed the step",
    ),
    ("samples = not seq.num_to_prefill", "samples = True", "every chunk of a prompt samples"),
    ("                return\n\n    # Seats", "\n    # Seats", "tokens after the last are handed out"),
    ("num >= seq.new.min_tokens", "num > seq.new.min_tokens", "min_tokens is one too many"),
    ("num >= seq.new.min_tokens", "True", "min_tokens is ignored"),
    (
        "None if token in seq.new.eos_token_ids else token",
        "token",
        "an end of sequence is called a stop token",
    ),
    ("len(seq.tokens) <= seq.limit:", "len(seq.tokens) <= seq.limit + 1:", "one token too many"),
    ("in result.errors.items():", "in ():", "errors go unnoticed"),
    (
        "                self.holdings.forget(seq.kv)  # what they hold may be why it failed\n",
        "",
        "blocks of a failed sequence are found",
    ),
    ("if not seq.new.read_cache:", "if False:", "everybody reads the cache"),
    (" + self.seats.num_taken * self._headroom", "", "admission leaves no room to grow"),
    ("ahead and ahead >= share", "False", "sequences are seated long before they can run"),
    ("if s.rank[0] <= priority)", ")", "urgent sequences queue behind long prefills"),
    (
        "                break\n        else:\n            return False",
        "                break",
        "preempted in vain",
    ),
    ("and block not in kept", "", "blocks that are to be shared are counted as gained"),
    ("        self.tenants.leave(seq.tenant)\n", "", "tenants never leave"),
    ("seq.tenant.served += seq.num_to_prefill * seq.tenant.price", "pass", "prompts cost a tenant nothing"),
    (
        "seq.tenant.served -= seq.num_to_prefill * seq.tenant.price",
        "pass",
        "tenants pay for what was not computed",
    ),
    ("            seq.tenant.served += seq.tenant.price\n", "", "outputs cost a tenant nothing"),
    ("new.prompt + new.output)", "new.prompt)", "outputs that a sequence brings are forgotten"),
    (
        "num_outputs = len(seq.tokens) - len(tokens) - len(seq.new.prompt)",
        "num_outputs = len(seq.tokens) - len(tokens) - len(seq.new.prompt) - len(seq.new.output)",
        "outputs that a sequence brings do not count",
    ),
    (
        "limit=len(new.prompt) + new.max_tokens - 1,",
        "limit=len(new.prompt) + len(new.output) + new.max_tokens - 1,",
        "a sequence may have max_tokens beside the outputs it brings",
    ),
    (
        "seq.slot, tokens, len(seq.new.prompt)",
        "seq.slot, tokens, len(seq.new.prompt) + len(seq.new.output)",
        "outputs that a sequence brings are called prompt",
    ),
    (
        "hit if self.checkpoints is None else",
        "hit if True else",
        "what lacks only a state is told as evicted",
    ),
    ("if seq.stats.seated_s is None:", "if True:", "a return counts as a first seat"),
    (
        "        self._settle(seq, seq.kv.num_published, seq.kv.num_claimed)\n",
        "",
        "those who wait for a lost sequence wait for ever",
    ),
    ("        self._settle(seq, first, full)\n", "", "those who wait for a block do not hear of it"),
    ("and not self.seats.has_ends", "", "idle before the device has heard of every end"),
    ("left = min(left, max(", "min(left, max(", "the gap is ignored"),
    (
        "max(most - num_decodes, limits.min_prefill_tokens)",
        "max(most - num_decodes, 0)",
        "the gap stops prefills",
    ),
    ("max(most - num_decodes, ", "max(most, ", "decodes are left out of the gap"),
    ("self.cost.least(num_decodes)", "0.0", "prompts get what is left of the gap, however little"),
]
BLOCKS = [
    ("keys[-1] if keys else root", 'keys[-1] if keys else b""', "cache roots are ignored"),
    ("block.update(parent + ", "block.update(", "a key does not depend on what comes before"),
    ("range(len(keys), num)", "range(num)", "keys are computed twice"),
    ("reversed(blocks)", "blocks", "a chain's head is evicted before its tail"),
    (
        "if (key := self._forget(block)) is not None:",
        "if (key := self.key_of.get(block)) is not None:",
        "an overwritten block is found",
    ),
    ("if not self.caching:", "if False:", "blocks are found with caching off"),
    (
        "self.free.move_to_end(block, last=False)",
        "self.free.move_to_end(block)",
        "cached blocks are evicted before empty ones",
    ),
    ("if key not in self.by_key and block not in self.key_of:", "if True:", "a key moves to another block"),
    ("                del self.free[block]\n", "                pass\n", "a block is free and held"),
    (
        "block, _ = self.free.popitem(last=False)",
        "block, _ = self.free.popitem()",
        "the last used goes first",
    ),
    ("self._evicted[key] = None", "pass", "nothing was ever evicted"),
    ("while len(self._evicted) > MAX_EVICTED:", "while False:", "every key is remembered for ever"),
    (
        "key in self._evicted or key in self.by_key",
        "key in self._evicted",
        "what is behind a gap was never there",
    ),
    (" + tokens[last : span[1]].tobytes()", "", "a key does not tell what a block sees of later ones"),
    ('array("q", span).tobytes() + ', "", "a key does not tell where a span begins"),
]
LOOKUPS = [
    (
        "num_tokens = len(seq.new.prompt)\n",
        "num_tokens = len(seq.tokens)\n",
        "outputs that a sequence brings count as prompt looked up",
    ),
    ("if sharing.is_promised(key):", "if False:", "what is being computed is new"),
    ("elif pool.was_evicted(key):", "elif False:", "what made room is new"),
    (
        "unfinished += size\n        elif",
        "unfinished += size\n        if",
        "a block is missed for two reasons",
    ),
    ("there = min(num_there, full)", "there = num_found", "no state is ever missed"),
    ("there = min(num_there, full)", "there = num_there", "states of outputs are missed"),
    ("if seq.new.read_cache and pool.caching:", "if seq.new.read_cache:", "a cache that is off is read"),
    ("if seq.new.read_cache and pool.caching:", "if pool.caching:", "a cache that is not to be read is"),
    ("max(num_tokens // size, num_found)", "num_tokens // size", "outputs that were found are missed"),
    ("min(full, len(seq.kv.keys))", "len(seq.kv.keys)", "outputs are missed"),
    ("        self.misses += misses\n", "", "misses are not counted"),
    (
        "min(num_found * pool.block_size, num_tokens)",
        "num_found * pool.block_size",
        "cached outputs are prompt",
    ),
]
SHARING = [
    ("if owner is None or owner.rank[0] > seq.rank[0]:", "if owner is None:", "one waits for lower priority"),
    ("if self._owner.get(key) is seq:", "if key in self._owner:", "one breaks another's promise"),
    ("self._owner.setdefault(key, seq)", "pass", "nobody promises anything"),
    ("            del self._waits_for[waiter]\n", "            pass\n", "woken ones are still parked"),
]
SEATS = [
    ("            self._ended.append(seq.slot)\n", "", "the device does not hear of an end"),
    ("            heappush(self._free, seq.slot)\n", "", "slots leak"),
    ("            seq.slot = -1\n", "", "a slot is kept after its end"),
    ("return max((line[-1]", "return min((line[-1]", "the best of two loses its seat"),
    ("seq.rank[0] > priority", "seq.rank[0] >= priority", "equals preempt each other"),
    ("self._ended = self._ended, []", "self._ended = self._ended, self._ended", "ends are told twice"),
]
POLICY = [
    ("Tenant(name, least or 0.0)", "Tenant(name, 0.0)", "a new tenant starts at zero"),
    ("tenant.price = 1 / share", "tenant.price = 1.0", "shares are ignored"),
    ("tenant.served <= least", "False", "a tenant saves up what it did not use"),
    ("(seq.tenant.served, seq.rank)", "seq.rank", "tenants are served in order of arrival"),
    ("self._priorities[0]].values()", "self._priorities[-1]].values()", "lower priority first"),
    ("line[0] for line in lines", "line[-1] for line in lines", "last come, first served"),
    ("            self._priorities.remove(priority)\n", "", "a priority stays when nobody has it"),
]
COST = [
    ("max(self.num_steps - 1, 1)", "self.num_steps", "a cold first step counts like any other"),
    ("min(slow, fast * high / low)", "slow", "a cold large step keeps steps small"),
    ("* min(tokens / curve[0][0], 1.0)", "* 1.0", "few tokens take as long as the smallest step"),
    ("max(begun, self._last_end)", "begun", "overlapping steps count their waiting"),
    ("min(ceiling, group.seconds)", "group.seconds", "one slow step caps all larger ones"),
    (
        "max(1 / max(self.num_steps - 1, 1), WEIGHT)",
        "1 / max(self.num_steps - 1, 1)",
        "old steps are never forgotten",
    ),
    ("return int(low * seconds / fast)", "return int(low)", "steps never grow beyond the largest one"),
    ("if seconds > 0:", "if True:", "a step may take no time"),
    ("self._begun.pop(step)", "self._begun[step]", "begun steps are kept for ever"),
]
LOOP = [
    ("self._settle(self.depth - 1)", "self._settle(self.depth)", "one plan too many in flight"),
    ("max(self.depth - 2, 0)", "self.depth", "masks do not know the newest tokens"),
    ("self.inflight.popleft()", "self.inflight.pop()", "the newest plan is committed first"),
    ("if plan.work or plan.ends:", "if plan.work:", "plans without work are not launched"),
    ("return not self.inflight and self", "return self", "idle with plans in flight"),
]
LIMITS = [
    ("if longest > self.prefill_room:", "if longest > self.max_batched_tokens:", "a span may wait for ever"),
    ("spare + 1 - (", "spare - (", "a span that fits is refused"),
    ("room and room + 1,", "room and room + 2,", "a sequence that never fits is accepted"),
    ("room and room + 1,", "room and room,", "a sequence that fits is refused"),
    ("if len(new.output) >= new.max_tokens:", "if False:", "a sequence with nothing left is accepted"),
]
NEAR = [
    ("position - window + 1", "position - window + 2", "a window lacks its first position"),
    ("position // chunk * chunk)", "position)", "a chunk lacks its first positions"),
    (
        "not parts and self.span <= num:",
        "not parts:",
        "windows that do not fit are accepted",
    ),
    ("even if even < self.span else", "num if even < self.span else", "near blocks take no room"),
]
HOLDINGS = [
    ("        self.pool.hold(self.held(hit))\n", "", "blocks found in the cache are not held"),
    (
        "            if not self._is_there(keys[at]):\n                end = at\n",
        "            pass\n",
        "a beginning is taken over of which near layers lack something",
    ),
    (
        "                self.beside[block] = kv.near[-1]\n",
        "",
        "the device does not hear what is beside a block",
    ),
    (
        "min(self._first(position), kv.num_published)",
        "self._first(position)",
        "what nobody can find is given up",
    ),
    (
        "        kv.passed = first\n",
        "        kv.passed = first + 1\n",
        "one block more is given up than is let go",
    ),
    ("            del kv.near[: first - kv.passed]\n", "", "what was given up is held"),
    ("        self.pool.release(gone)\n", "", "what is given up is never free"),
    (
        "                self._forget(kv.keys[i])\n",
        "                pass\n",
        "near blocks are found beside another block",
    ),
    (
        "        self.pool.release([block for near in kv.near for block in near])\n",
        "",
        "near blocks leak",
    ),
    (
        "kv.blocks[kv.passed :] if self.whole else kv.blocks)",
        "kv.blocks)",
        "what was given up is released again",
    ),
]
WAYS = [
    (
        "holdings.give_up(kv, len(seq.tokens) - 1)",
        "holdings.give_up(kv, seq.planned)",
        "drafts count as computed",
    ),
    ("holdings.give_up(kv, seq.planned)\n", "pass\n", "a prefill gives nothing up"),
    (
        "if (victim := self.seats.prefilling[-1]) is seq:",
        "if (victim := self.seats.worst) is seq:",
        "who is planned already makes way",
    ),
    ("min(count, chunk - start % chunk)", "min(count, chunk)", "a step crosses the end of a chunk"),
]
CHECKPOINTS = [
    ("range(len(keys), 0, -1)", "range(len(keys), len(keys) - 1, -1)", "only the whole beginning is found"),
    ("            del self.free[row]\n", "            pass\n", "a row is free and held"),
    (
        "row, _ = self.free.popitem(last=False)\n        self._forget(row)",
        "row, _ = self.free.popitem(last=False)",
        "an overwritten state is found",
    ),
    ("        self.release(row)\n", "", "a published row has a holder for ever"),
    ("if key not in self.by_key:", "if True:", "a key moves to another row"),
    (
        "if (row := self.by_key.get(key)) is not None and row in self.free:",
        "if (row := self.by_key.get(key)) is not None:",
        "a row that is held is made free",
    ),
]
STATES = [
    (
        "            hit = self.holdings.find(seq.kv.keys[:taken])\n",
        "            break\n",
        "a beginning without a state, or that ends in a span, is taken over",
    ),
    (
        "return num if self.checkpoints is None else self.checkpoints.find(seq.kv.keys[:num])",
        "return num",
        "a beginning without a state is taken over",
    ),
    ("if w.seq in result.lost and w.epoch == seq.epoch:", "if False:", "a lost state goes unnoticed"),
    (
        "                    self.checkpoints.forget(seq.kv.keys)\n",
        "                    pass\n",
        "states of a failed sequence are found",
    ),
]
KEPT_STATES = [
    ("        checkpoints.release(row)\n", "        pass\n", "rows leak"),
    ("kv.keys[seq.planned // pool.block_size - 1]", "kv.keys[0]", "another state is restored"),
    ("kv.cuts = {last, len(", "kv.cuts = {len(", "no state is kept where the same prompt looks"),
    ("if over or checkpoints is None", "if checkpoints is None", "states are kept within blocks"),
    ("[num for num in kv.saves if num <= full]", "[*kv.saves]", "a state is found before it is computed"),
    ("        kv.restore = -1\n", "        pass\n", "a restored row is let go twice"),
    ("        return num_blocks in owner.kv.saves\n", "        return True\n", "one waits for no state"),
    ("    owner.kv.cuts.add(num_blocks)\n", "", "who is waited for keeps no state"),
    ("            checkpoints.demote(kv.passing)\n", "", "states in passing fill the rows"),
]
WHOLE_SPANS = [  # of the scheduler
    (
        "num = whole_blocks(seq.new.spans, num_found, self.pool.block_size)",
        "num = num_found",
        "what is found ends in a span",
    ),
    (
        "        num = whole_blocks(seq.new.spans, num, self.pool.block_size)\n",
        "",
        "one waits for a part of a span",
    ),
    ("(span[0] if span[0] > start else span[1]) - start", "count", "a step ends in a span"),
    (
        "(span[0] if span[0] > start else span[1]) - start",
        "span[1] - start",
        "a step is larger than it may be",
    ),
    ("max(left, least) if left == share else left", "left", "a span waits for ever"),
    ("max(left, least) if left == share else left", "max(left, least)", "spans of several exceed a step"),
    ("            if most < least:\n                continue\n", "", "a span begins that has no room"),
    ("restore, new.coordinates, new.spans", "restore, new.coordinates", "the device does not hear of spans"),
    ("num, new.coordinates, new.spans)", "num, new.coordinates)", "keys do not know of spans"),
]
SPANS = [
    (
        "bisect_left(spans, (position,)) - 1",
        "bisect_left(spans, (position + 1,)) - 1",
        "a span is around its start",
    ),
    ("spans[i][1] > position", "spans[i][1] >= position", "a span is around its end"),
    ("bisect_right(spans, first, key", "bisect_left(spans, first, key", "a span has what follows it"),
    ("spans[i][0] >= end", "spans[i][0] > end", "a span has what is before it"),
]
TRACE = [
    ('("prompt", "output")', '("prompt",)', "outputs are replayed as they were read"),
    ("{**asdict(new), **stops,", '{**asdict(new), "output": [], **stops,', "outputs are not recorded"),
    ('        self._write(["abort", id])\n', "", "aborts are not recorded"),
    ("if planned == recorded:", "if True:", "nothing is compared"),
]
MUTANTS = [
    Mutant(f"{name}.py", *mutant)
    for name, mutants in (
        ("scheduler", SCHEDULER + STATES + WAYS + WHOLE_SPANS),
        ("states", KEPT_STATES),
        ("spans", SPANS),
        ("near", NEAR),
        ("holdings", HOLDINGS),
        ("checkpoints", CHECKPOINTS),
        ("blocks", BLOCKS),
        ("sharing", SHARING),
        ("lookups", LOOKUPS),
        ("seats", SEATS),
        ("policy", POLICY),
        ("cost", COST),
        ("loop", LOOP),
        ("limits", LIMITS),
        ("trace", TRACE),
    )
    for mutant in mutants
]


def planted(mutant: Mutant) -> str:
    """The file's text with the bug in it.

    Raises:
        ValueError: the text to be replaced is not there once, or what comes out does not parse.
    """
    source = (PACKAGE / mutant.file).read_text()
    if (count := source.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.file} has {mutant.old!r} {count} times; update the list of bugs")
    text = source.replace(mutant.old, mutant.new)
    compile(text, mutant.file, "exec")
    return text


def copy_of_the_package(folder: Path) -> Path:
    """What the scheduler and its tests need, in `folder`; returns where the scheduler is."""
    ignore = shutil.ignore_patterns("__pycache__", "test_mutants.py")
    for path in ("quire/scheduler", "tests/scheduler"):
        shutil.copytree(ROOT / path, folder / path, ignore=ignore)
    for path in ("quire/__init__.py", "quire/errors.py", "quire/types.py"):
        shutil.copy(ROOT / path, folder / path)
    (folder / "pytest.ini").write_text(CONFIG)
    (folder / "conftest.py").write_text(CONFTEST)
    return folder / "quire" / "scheduler"


def run_tests(folder: Path, timeout_s: float) -> str | None:
    """None if all tests pass, or else the first that fails."""
    files = sorted(
        (folder / "tests" / "scheduler").glob("test_*.py"), key=lambda path: (path.name in LAST, path)
    )
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "-m",
        "not slow",
        *map(str, files),
    ]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0].rpartition("::")[2] if failed else done.stdout[-2000:]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def survives(mutant: Mutant, folder: Path, package: Path, timeout_s: float) -> bool:
    """Plant one bug, run the tests, take it out again."""
    path = package / mutant.file
    source = path.read_text()
    path.write_text(planted(mutant))
    found = run_tests(folder, timeout_s)
    path.write_text(source)
    say(f"{'SURVIVED' if found is None else 'killed  '}  {mutant.file:13} {mutant.what}  [{found or '-'}]")
    return found is None


def num_survivors(mutants: Sequence[Mutant]) -> int:
    """How many bugs the tests do not find."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package = copy_of_the_package(folder)
        begin = time.monotonic()
        if (failed := run_tests(folder, MAX_S)) is not None:
            raise SystemExit(f"the tests fail without any bug: {failed}")
        timeout_s = 3 * (time.monotonic() - begin) + 10
        return sum(survives(mutant, folder, package, timeout_s) for mutant in mutants)


def main(words: Sequence[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file} {m.what}" for word in words)]
    survivors = num_survivors(chosen)
    say(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="plant only bugs that have one of these words")
    sys.exit(main(parser.parse_args().words))
