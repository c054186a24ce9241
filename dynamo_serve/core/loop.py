"""inbox → plan → step → publish: one turn of the engine process, repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from dynamo_serve.core import views
from dynamo_serve.core.batch import Batch
from dynamo_serve.core.engine import CopyingEngine, Engine, ForwardingEngine, HoldingEngine
from dynamo_serve.core.flight import Doing, FlightRecorder, num_bytes
from dynamo_serve.core.ladder import Mode
from dynamo_serve.core.request import Request, Resumed, TokenEvent
from dynamo_serve.core.rescue import Rescue
from dynamo_serve.core.restoring import take_copies
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.stats import Stats, StepStats
from dynamo_serve.core.tenant import Tenancy

IDLE_SECONDS = 0.1  # without work, before the books are read: a large pool takes a while
# What is obeyed between two steps: admission and answers look ahead, and that takes time.
MAX_COMMANDS = 128
COMMAND_SECONDS = 0.01
COPY_SECONDS = 0.001  # between two looks at copies while nothing else can go on
UNSEEN_SECONDS = 10.0  # what a watcher is told of a prompt longer than any the engine has run
MAX_NEWCOMERS = 8  # at a time, for which a step is held
LOOK_SECONDS = 0.004  # between two looks, while a step runs, at who has come


class Submit(NamedTuple):
    """A new request, or, with `done`, one that goes on where it was."""

    request: Request
    done: Resumed | None = None


class Cancel(NamedTuple):
    request_id: str


class Unpin(NamedTuple):
    """Give up the pages of a pinned prefix, by the id of the request that computed it."""

    request_id: str


class Declare(NamedTuple):
    """Keys of pages that all tenants share; before anything else."""

    keys: list[bytes]


class Configure(NamedTuple):
    """Other tenants, classes and quotas from now on; nothing live is dropped."""

    tenancy: Tenancy


class Steer(NamedTuple):
    """Pin, forbid or release rungs of the ladder; the others stay as they are."""

    modes: dict[str, str]


class Inspect(NamedTuple):
    """A question to the scheduler: `what` is one of those that `core.views` answers, some
    of them `about` something; "endpoints" are a question to a `ForwardingEngine`."""

    ticket: int
    what: str
    id: str = ""
    about: tuple[Any, ...] = ()


class Stop(NamedTuple):
    """End the loop after this turn; whatever is live is abandoned."""


Command = Submit | Cancel | Unpin | Declare | Configure | Steer | Inspect | Stop

Inbox = Callable[[float | None], list[Command]]
"""Everything that has arrived; waits at most so many seconds for the first (None: for ever)."""

Publish = Callable[[list[TokenEvent], Stats], None]
"""Called once per step, however many requests got a token, and before a step for refusals and
the like."""

Reply = Callable[[int, Any], None]
"""Called with the ticket of an `Inspect` and its answer: plain lists, dicts, texts and numbers."""


class Loop:
    """Owns the scheduler and the engine; nothing else calls either."""

    def __init__(
        self,
        scheduler: Scheduler,
        engine: Engine,
        *,
        inbox: Inbox,
        publish: Publish,
        clock: Callable[[], float],
        reply: Reply = lambda ticket, answer: None,
        flight: FlightRecorder | None = None,
        tells_shapes: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.engine = engine
        self.rescue = Rescue(engine)
        self.copier = cast(CopyingEngine, engine) if scheduler.spill.tiers else None
        sequences = scheduler.limits.max_decode_sequences
        self.flight = flight or FlightRecorder(bytearray(num_bytes(sequences)))
        self.inbox = inbox
        self.publish = publish
        self.reply = reply
        self.clock = clock
        self.tells_shapes = tells_shapes
        self._postponed: list[Command] = []
        self._is_stopped = False
        self._is_checked = True
        self._failure: BaseException | None = None
        if scheduler.limits.hold_steps:
            cast(HoldingEngine, engine).hold_for(self._between, LOOK_SECONDS)

    def run(self) -> None:
        """Turn until told to stop. Raises what the engine raised if steps fail again and again."""
        while not self._is_stopped:
            self.turn()

    def turn(self) -> None:
        events: list[TokenEvent] = []
        commands = self._commands()
        ended = self.copier.copied() if self.copier else []
        if self.copier:
            take_copies(self.scheduler.life, ended, self.clock())
        until = self.clock() + COMMAND_SECONDS
        for count, command in enumerate(commands, start=1):
            events += self._obey(command)
            if self.clock() > until:
                self._postponed[:0] = commands[count:]
                break
        if not commands:
            self._check_if_idle()
        events += self.scheduler.expire(self.clock())
        if events:  # whoever is refused or gone need not wait for the step
            self._tell(events)
        batch = None if self._is_stopped else self.scheduler.schedule(self.clock())
        self._forget()
        self._begin_copies()
        if batch:
            self._step(batch)
            self._forget()
        elif self.scheduler.controller.has_news or ended:
            self._tell([])

    def _between(self) -> None:
        """A step is between two of its layers: who has come meanwhile may cut in. Raises nothing,
        for the engine may be in no position to pass it on: the turn ends with it."""
        if self._failure or self.scheduler.bill.held:
            return
        try:
            self._hear(0.0)
            if newcomers := self._newcomers():
                self._cut_in(newcomers)
        except BaseException as error:
            self._failure = error

    def _newcomers(self) -> list[Request]:
        """Requests to be queued while the step is held, taken out of what has arrived: up to the
        last one that may cut in, for nobody overtakes whoever came before. None while other tenants
        or the end are announced, which come first, or when there is more than a turn can do."""
        arrived = self._postponed
        scheduler = self.scheduler
        if len(arrived) > MAX_COMMANDS or not scheduler.bill.is_patient or scheduler.quarantine:
            return []
        if any(isinstance(command, Configure | Stop) for command in arrived):
            return []
        submits = [c for c in arrived if isinstance(c, Submit) and not c.done][:MAX_NEWCOMERS]
        while submits and not self.scheduler.may_cut_in(submits[-1].request):
            submits.pop()
        for command in submits:
            arrived.remove(command)
        return [command.request for command in submits]

    def _cut_in(self, newcomers: list[Request]) -> None:
        self.scheduler.bill.hold(self.clock())
        events = [event for request in newcomers for event in self._obey(Submit(request))]
        if events:
            self._tell(events)
        gone = {c.request_id for c in self._postponed if isinstance(c, Cancel)}
        ids = [request.id for request in newcomers if request.id not in gone]
        batch = self.scheduler.cut_in(ids, self.clock())
        self._begin_copies()  # for who was admitted and has to wait for pages
        if batch:
            self._step(batch)
        self.scheduler.bill.resume(self.clock())

    def _commands(self) -> list[Command]:
        """What has arrived, but no more than fits between two steps."""
        patience = 0.0 if self._postponed else self._patience()
        if patience != 0.0:
            self.flight.waits(self.clock())
        self._hear(patience)
        self.flight.turns(self.clock())
        self._postponed.sort(key=lambda command: isinstance(command, Inspect))  # answers can wait
        commands = self._postponed[:MAX_COMMANDS]
        del self._postponed[:MAX_COMMANDS]
        return commands

    def _hear(self, patience: float | None) -> None:
        if arrived := self.inbox(patience):
            self._postponed += arrived
            self.flight.took(len(arrived))

    def _patience(self) -> float | None:
        """How long the inbox may wait: not at all while there is something to run."""
        is_busy = self.scheduler.spill.flights.is_busy
        if self.scheduler.running:
            waits = is_busy and all(seq.restoring for seq in self.scheduler.running.values())
            return COPY_SECONDS if waits else 0.0
        if is_busy:  # also where somebody waits for pages that copies hold
            return COPY_SECONDS
        wake_at = self.scheduler.wake_at()
        if wake_at is not None:
            return max(0.0, wake_at - self.clock())
        return None if self._is_checked else IDLE_SECONDS

    def _check_if_idle(self) -> None:
        """Nobody waits for us: the time to see whether the books balance."""
        if self.scheduler.is_idle and not self._is_checked:
            self.scheduler.check()
            self._is_checked = True

    def _obey(self, command: Command) -> list[TokenEvent]:
        match command:
            case Submit(request, done):
                self._is_checked = False
                if done is None:
                    return self.scheduler.add(request, self.clock())
                return self.scheduler.resume(request, done, self.clock())
            case Cancel(request_id):
                return self.scheduler.cancel(request_id, self.clock())
            case Unpin(request_id):
                self.scheduler.pins.release(request_id)
                self._tell([])
            case Declare(keys):
                self.scheduler.pool.declare(keys)
            case Configure(tenancy):
                self.scheduler.configure(tenancy)
            case Steer(modes):
                wanted = {name: Mode(mode) for name, mode in modes.items()}
                self.scheduler.controller.steer(wanted, self.clock())
            case Inspect():
                self.reply(command.ticket, self._answer(command))
            case Stop():
                self._is_stopped = True
        return []

    def _answer(self, asked: Inspect) -> Any:
        if asked.what == "endpoints":
            return cast(ForwardingEngine, self.engine).endpoints()
        return views.answer(self.scheduler, asked.what, asked.id, self.clock(), asked.about)

    def _forget(self) -> None:
        if dropped := self.scheduler.take_dropped():
            self.engine.drop(dropped)

    def _begin_copies(self) -> None:
        if self.copier and (copies := self.scheduler.spill.flights.take()):
            self.copier.copy(copies)

    def _tell(self, events: list[TokenEvent], step: StepStats | None = None) -> None:
        self.publish(events, self.scheduler.stats(step))

    def _take_off(self, batch: Batch) -> Doing:
        plan = self.scheduler.bill.planned
        ids = (work.seq_id for work in batch.work)
        predicted = plan.predicted_seconds
        if plan.shape.prefill_tokens > self.scheduler.cost.reach:  # nothing like it has been seen
            predicted = max(predicted, UNSEEN_SECONDS)
        return self.flight.steps(ids, plan.began, predicted)

    def _step(self, batch: Batch) -> None:
        before = self._take_off(batch)
        outputs, self.scheduler.bill.is_smooth = self.rescue.step(batch)
        if self._failure:
            raise self._failure
        now, plan = self.clock(), self.scheduler.bill.planned
        step = StepStats(
            phase=batch.phase.value,
            seconds=now - plan.began,
            num_tokens=plan.shape.tokens,
            num_sequences=len(batch.work),
            predicted_seconds=plan.predicted_seconds,
            shape=plan.shape if self.tells_shapes and self.scheduler.bill.is_smooth else (),
        )
        self._tell(self.scheduler.update(batch, outputs, now), step)
        self.flight.goes_on(before, now - plan.began)  # only now: what fails above was of this step
