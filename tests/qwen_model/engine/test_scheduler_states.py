"""A machine of hypothesis that does with a scheduler what clients may do, in any order, on tiny devices."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from qwen_model import SamplingOptions
from qwen_model.engine.sequences import Event, Sequence
from qwen_model.interface.device import UNUSED_PAGE
from tests.qwen_model.engine.sequences_alone import EvenOrOdd, alone, check, scheduler_of
from tests.support.fake_device import FakeDevice, hashed_logits

# Few tokens, so that prompts have common beginnings.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20)
samplings = st.sampled_from([SamplingOptions(), SamplingOptions(temperature=1.0, seed=1)])


class SchedulerMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(
        slots=st.integers(1, 5),
        pages=st.integers(12, 30),
        size=st.sampled_from([2, 4]),
        chunk=st.integers(1, 12),
        runs_ahead=st.booleans(),
        mixes=st.booleans(),
        deterministic=st.booleans(),
    )
    def begin(self, slots, pages, size, chunk, runs_ahead, mixes, deterministic):
        self.device = FakeDevice(slots, 16, pages * 4 // size, size, runs_ahead=runs_ahead, mixes=mixes)
        self.scheduler = scheduler_of(self.device, chunk_tokens=chunk, deterministic=deterministic)
        self.events: dict[Sequence, list[Event]] = {}
        self.held: list[list[Sequence]] = []

    def add_sequence(self, sequence):
        self.events[sequence] = []
        self.scheduler.add(sequence)
        return sequence

    @rule(target=sequences, prompt=prompts, count=st.integers(1, 15), sampling=samplings, masked=st.booleans())
    def add(self, prompt, count, sampling, masked):
        return self.add_sequence(Sequence(prompt, count, sampling, masker=EvenOrOdd() if masked else None))

    @rule(target=sequences, parent=sequences, draws=st.integers(0, 3), count=st.integers(1, 15))
    def add_sample(self, parent, draws, count):
        sampling = SamplingOptions(temperature=1.0, seed=2)
        return self.add_sequence(Sequence(list(parent.prompt), count, sampling, draws=draws, parent=parent))

    @rule(target=sequences, parent=sequences, more=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def add_turn(self, parent, more):
        return self.add_sequence(Sequence([*parent.tokens[:25], *more], 3))

    @rule(prompt=prompts, count=st.integers(1, 8))
    def add_held(self, prompt, count):
        """Rows as those of a beam search: a row waits after each token, and goes on as a copy of any."""
        row = Sequence(prompt, count + 1, num_best=2, hold=True)
        self.held.append([self.add_sequence(row)])

    def advance_held(self, draw_source):
        """Let rows go on whose tokens have all come, or end them."""
        for rows in self.held[:]:
            if not all(self.events[row] for row in rows):
                continue
            best = [self.events[row].pop().logprob.best for row in rows]
            assert [found[0][0] for found in best] == [self.best_of(row) for row in rows]
            if len(rows[0].tokens) + 1 >= rows[0].max_length:
                self.held.remove(rows)
                for row in rows:
                    self.scheduler.cancel(row)
                continue
            sources = [draw_source(len(rows)) for _ in range(2)]
            tokens = [best[source][place % 2][0] for place, source in enumerate(sources)]
            while len(rows) < 2:
                rows.append(Sequence(rows[0].prompt, rows[0].max_new_tokens, num_best=2, hold=True))
                self.events[rows[-1]] = []
            self.scheduler.advance(rows, sources, tokens)

    @staticmethod
    def best_of(row):
        return int(hashed_logits(row.tokens, len(row.prompt)).argmax())

    @rule(data=st.data())
    def advance(self, data):
        self.advance_held(lambda count: data.draw(st.integers(0, count - 1)))

    @rule(sequence=consumes(sequences))
    def cancel(self, sequence):
        self.scheduler.cancel(sequence)

    @rule(steps=st.integers(1, 5))
    def step(self, steps):
        for _ in range(steps):
            for event in self.scheduler.step():
                self.events[event.sequence].append(event)

    @precondition(lambda self: hasattr(self, "scheduler"))
    @invariant()
    def pages_are_counted(self):
        """Each page has as many users as sequences have it; those without a user are free."""
        pool = self.scheduler.pool
        of_sequences = [page for sequence in self.events for page in sequence.pages]
        assert UNUSED_PAGE not in of_sequences
        users = [of_sequences.count(page) for page in range(pool.num_pages)]
        assert [pool.users(page) for page in range(pool.num_pages)] == users
        assert pool.num_free == users.count(0) - 1
        slots = [sequence.slot for sequence in self.events if sequence.slot is not None]
        assert len(set(slots)) == len(slots) <= self.device.max_sequences

    @precondition(lambda self: hasattr(self, "scheduler"))
    @invariant()
    def tokens_are_those_of_each_alone(self):
        for sequence in self.events:
            if sequence.finish_reason is None and not sequence.hold:
                assert sequence.output == alone(sequence)[0][: len(sequence.output)]

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            self.advance_held(lambda count: count - 1)
            if not self.scheduler.has_work:
                break
            self.step(1)
        assert not self.scheduler.has_work
        assert not self.held
        assert self.scheduler.pool.num_free == self.device.num_pages - 1
        for sequence, events in self.events.items():
            if sequence.finish_reason != "cancelled":
                check(sequence, events, hashed_logits)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
