"""dynamo_serve's engine as a decoupled model: the scheduler's loop in a thread of Triton's stub."""

import itertools
import json
import queue
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils  # only inside Triton

from dynamo_serve import settings
from dynamo_serve.building import Ends, Given, run_engine
from dynamo_serve.cli_model import model_path, whole_folder
from dynamo_serve.core.loop import Cancel, Stop, Submit
from dynamo_serve.core.request import Finish, Request, Resumed, Sampling
from dynamo_serve.core.stats import Standing
from dynamo_serve.core.tenant import Tenancy

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
LOOK_SECONDS = 0.05  # between two looks at who has gone
START_SECONDS = 600.0
COUNTED = ("tokens", "steps", "step_sequences")


class TritonPythonModel:
    def initialize(self, args):
        given = json.loads(args["model_config"]).get("parameters", {})
        flags = [
            settings.Given(key, value["string_value"], "config.pbtxt", is_text=True)
            for key, value in given.items()
        ]
        config = settings.load(flags=flags).config
        self.live = {}  # response senders by request id
        # Triton crashes when a sender is asked whether it is cancelled after its last response.
        self.lock = threading.Lock()
        self.commands = queue.SimpleQueue()
        self.numbers = itertools.count()
        self.is_ending = False
        self.failure = self.spec = None
        self.settled = threading.Event()
        self._declare(args["model_name"])
        path = whole_folder(model_path(config.model.path))
        given = Given(config, path, Tenancy(), Standing())
        self.threads = [
            threading.Thread(target=self._run, args=(given,), name="engine"),
            threading.Thread(target=self._watch, name="watch"),
        ]
        self.threads[0].start()
        self.settled.wait(START_SECONDS)
        if self.spec is None:
            raise pb_utils.TritonModelException(f"the engine does not start: {self.failure}")
        self.threads[1].start()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                wanted, done = self._read(request)
            except (KeyError, TypeError, ValueError) as error:
                fail(sender, f"the request must be well-formed: {error}")
                continue
            with self.lock:
                if self.failure is not None:
                    fail(sender, f"the engine is not healthy: {self.failure}")
                    continue
                self.live[wanted.id] = sender
            self.commands.put(Submit(wanted, done))

    def finalize(self):
        self.is_ending = True
        self.commands.put(Stop())
        for thread in self.threads:
            thread.join()

    # what comes in

    def _read(self, request):
        """The request, and how far it had got elsewhere. Raises what is wrong with it."""
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        ids = tuple(int(i) for i in tensors["input_ids"].reshape(-1))
        wishes = json.loads(tensors["request"].reshape(-1)[0])
        num_prompt, now = wishes.get("num_prompt", len(ids)), time.monotonic()
        sampling = wishes.get("sampling", {})
        bias = tuple((int(i), float(value)) for i, value in sampling.pop("logit_bias", ()))
        wanted = Request(
            f"{request.request_id()}-{next(self.numbers)}",
            ids[:num_prompt],
            wishes["max_tokens"],
            Sampling(**sampling, logit_bias=bias),
            frozenset(wishes.get("stop_ids", ())),
            wishes.get("min_tokens", 0),
            arrival=now,
        )
        longest = len(wanted.prompt_ids) + wanted.max_tokens
        if not wanted.prompt_ids or not wanted.max_tokens > 0:
            raise ValueError("a prompt and max_tokens over 0 are needed")
        if longest > self.spec.max_model_len:
            raise ValueError(f"{longest} tokens are more than {self.spec.max_model_len}")
        if not all(0 <= i < self.spec.vocab_size for i in ids):
            raise ValueError(f"token ids have to be below {self.spec.vocab_size}")
        done = Resumed(ids[num_prompt:], now, "engine_lost") if num_prompt < len(ids) else None
        return wanted, done

    def _inbox(self, patience):
        commands = []
        try:
            if patience != 0.0:
                commands.append(self.commands.get(timeout=patience))
            while True:
                commands.append(self.commands.get_nowait())
        except queue.Empty:
            return commands

    # what goes out

    def _publish(self, events, stats):
        for event in events:
            is_last = event.finish or event.refusal
            with self.lock:
                take = self.live.pop if is_last else self.live.__getitem__
                answer(take(event.request_id), event)
        self.counters["tokens"].increment(sum(len(event.token_ids) for event in events))
        if stats.step is not None:
            self.counters["steps"].increment(1)
            self.counters["step_sequences"].increment(stats.step.num_sequences)
        self.running.set(len(self.live))

    def _watch(self):
        """Who is cancelled there is cancelled here."""
        told = set()
        while not self.is_ending:
            time.sleep(LOOK_SECONDS)
            told &= self.live.keys()
            for name in list(self.live):
                with self.lock:
                    sender = self.live.get(name)
                    is_gone = name not in told and sender is not None and sender.is_cancelled()
                if is_gone:
                    told.add(name)
                    self.commands.put(Cancel(name))

    def _run(self, given):
        def ready(spec):
            self.spec = spec
            self.settled.set()

        nothing = lambda *_: None  # noqa: E731
        try:
            run_engine(given, Ends(ready, nothing, self._inbox, self._publish, nothing, None))
        except Exception as error:
            pb_utils.Logger.log_error(f"the engine has ended: {error!r}")
            with self.lock:  # who comes from now on is told at once
                self.failure = error
                for sender in self.live.values():
                    fail(sender, f"the engine is not healthy: {error}")
                self.live.clear()
        self.settled.set()

    def _declare(self, model):
        """Counters and gauges that Triton shows beside its own; the mean batch is step_sequences
        divided by steps."""
        family, labels = pb_utils.MetricFamily, {"model": model}
        self.families = {
            name: family(
                name=f"dserve_engine_{name}_total",
                description=f"What the engine has run: {name}",
                kind=family.COUNTER,
            )
            for name in COUNTED
        }
        self.counters = {name: each.Metric(labels=labels) for name, each in self.families.items()}
        self.families["live"] = family(
            name="dserve_engine_live", description="Requests under way", kind=family.GAUGE
        )
        self.running = self.families["live"].Metric(labels=labels)


def answer(sender, event):
    if event.refusal is not None:
        fail(sender, f"maximum queue size: {event.refusal.message}")
    elif event.finish is Finish.ERROR:
        fail(sender, event.error or "the engine failed this request")
    elif event.finish is Finish.CANCELLED:
        sender.send(flags=FINAL)
    else:
        reason = event.finish.value if event.finish else "None"
        said = [
            pb_utils.Tensor("token_ids", np.array(event.token_ids, dtype=np.int64)),
            pb_utils.Tensor("finish_reason", np.array([reason.encode()], dtype=np.object_)),
        ]
        sender.send(pb_utils.InferenceResponse(said), flags=FINAL if event.finish else 0)


def fail(sender, message):
    error = pb_utils.TritonError(message)
    sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
