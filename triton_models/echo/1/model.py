"""Answers a prompt with its own words, one for each token, in the dialect that its config declares.

For tests: it needs nothing but numpy, and prompts tell it how to behave. `@pause=20` waits so many
milliseconds before each token, `@fail=3` fails after so many tokens, `@mute=1` never says anything,
`@die=1` ends the process. It stops at the end of the prompt, or begins again with `ignore_eos`.
"""

import json
import os
import queue
import re
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils  # only inside Triton

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
LOOK_SECONDS = 0.005  # between two looks at who has gone while nothing is due
WORD = re.compile(r"\s*\S+|\s+$")
ORDER = re.compile(r"@(\w+)=(\d+)")
ASKED = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")


def value_of(request, name):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1)[0]


class Answer:
    """One request, and how far its answer has got."""

    def __init__(self, request, inputs):
        self.sender = request.get_response_sender()
        given = {name: value_of(request, name) for name in inputs}
        self.prompt = given["text_input"].decode()
        self.repeats = "streaming" in inputs
        self.is_bytes = not self.repeats and "sampling_parameters" not in inputs
        self.asked = {name for name in ASKED if given.get(name)}
        wishes = json.loads(given.get("sampling_parameters") or b"{}")
        asked = given.get("max_tokens") or given.get("sampling_param_max_tokens")
        self.max_tokens = int(asked or wishes.get("max_tokens", 16))
        self.words = WORD.findall(self.prompt)
        self.stops = not wishes.get("ignore_eos")
        self.orders = {name: int(value) for name, value in ORDER.findall(self.prompt)}
        self.pause = self.orders.get("pause", 0) / 1000
        self.due = time.monotonic() + self.pause
        self.count = 0
        self.rest = b""  # of a character that has been cut
        self.said = b""

    def is_due(self):
        return "mute" not in self.orders and self.due <= time.monotonic()

    def go_on(self):
        """Send the next token; whether that was the last."""
        if self.count >= self.orders.get("fail", 1 << 30):
            self._fail("this is where I was told to fail", pb_utils.TritonError.INTERNAL)
            return True
        if not self.words:
            self._fail("text_input must be a text", pb_utils.TritonError.INVALID_ARG)
            return True
        if "die" in self.orders:
            os._exit(1)
        word = self.words[self.count % len(self.words)].encode()
        self.count += 1
        is_over = self.stops and self.count == len(self.words)
        finish = "stop" if is_over else "length" if self.count >= self.max_tokens else "None"
        if self.is_bytes and finish == "None":
            word, self.rest = self.rest + word[:-1], word[-1:]
        else:
            word, self.rest = self.rest + word, b""
        self.said += word
        self._send(self.said if self.repeats else word, finish)
        self.due = time.monotonic() + self.pause
        return finish != "None"

    def _send(self, word, finish):
        said = [pb_utils.Tensor("text_output", np.array([word], dtype=np.object_))]
        if "return_finish_reason" in self.asked:
            reason = np.array([finish.encode()], dtype=np.object_)
            said.append(pb_utils.Tensor("finish_reason", reason))
        if "return_num_input_tokens" in self.asked:
            count = np.array([len(self.words)], dtype=np.uint32)
            said.append(pb_utils.Tensor("num_input_tokens", count))
        if "return_num_output_tokens" in self.asked:
            said.append(pb_utils.Tensor("num_output_tokens", np.array([1], dtype=np.uint32)))
        flags = 0 if finish == "None" else FINAL
        self.sender.send(pb_utils.InferenceResponse(said), flags=flags)

    def _fail(self, message, code):
        error = pb_utils.TritonError(message, code)
        self.sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.inputs = [entry["name"] for entry in config["input"]]
        self.came = queue.SimpleQueue()
        self.is_ending = False
        labels = {"model": args["model_name"]}
        counted = pb_utils.MetricFamily(
            name="echo_requests_total",
            description="Requests by what became of them",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self.families = [counted]
        self.ended = {
            how: counted.Metric(labels={**labels, "outcome": how}) for how in ("done", "cancelled")
        }
        live = pb_utils.MetricFamily(
            name="echo_live", description="Answers under way", kind=pb_utils.MetricFamily.GAUGE
        )
        self.families.append(live)
        self.live = live.Metric(labels=labels)
        self.thread = threading.Thread(target=self._turn)
        self.thread.start()

    def execute(self, requests):
        for request in requests:
            self.came.put(Answer(request, self.inputs))

    def finalize(self):
        self.is_ending = True
        self.thread.join()

    def _turn(self):
        """All answers go on beside each other; one that nobody wants any more ends."""
        answers = []
        while not (self.is_ending and not answers):
            answers += self._newcomers(answers)
            for answer in list(answers):
                if answer.sender.is_cancelled():
                    answer.sender.send(flags=FINAL)
                    answers.remove(answer)
                    self.ended["cancelled"].increment(1)
                elif answer.is_due() and answer.go_on():
                    answers.remove(answer)
                    self.ended["done"].increment(1)
            self.live.set(len(answers))

    def _newcomers(self, answers):
        came = []
        due = [answer.due for answer in answers if "mute" not in answer.orders]
        patience = min([LOOK_SECONDS, *(at - time.monotonic() for at in due)])
        try:
            came.append(self.came.get(timeout=max(0.0, patience)))
            while True:
                came.append(self.came.get_nowait())
        except queue.Empty:
            return came
