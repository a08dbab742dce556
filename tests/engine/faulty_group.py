"""An engine group with requests in it that kill it, or make it hang, or keep it busy. Only tests start it."""

import os
import socket
import threading
import time

from quire.engine import group
from quire.runner.runner import Runner
from quire.scheduler.plan import Plan

DIES, HANGS, COMPUTES = (
    5,
    6,
    7,
)  # token ids; a logit bias of k / 1000 for one means: as soon as there are k output tokens


def main(sock: socket.socket) -> None:
    launch, prompt_len = Runner.launch, {}

    def deadly(self: Runner, plan: Plan) -> None:
        prompt_len.update((start.seq, start.prompt_len) for start in plan.starts)
        for work in plan.work:
            num_outputs = work.start + work.count - prompt_len[work.seq]
            bias = self.sampling[work.seq].params.logit_bias or {}
            if DIES in bias and num_outputs >= round(bias[DIES] * 1000):
                os.abort()
            if HANGS in bias and num_outputs >= round(bias[HANGS] * 1000):
                threading.Event().wait()
            if bias.get(COMPUTES) == num_outputs / 1000:
                end = time.process_time() + 1.5
                while time.process_time() < end:
                    pass
        launch(self, plan)

    Runner.launch = deadly  # type: ignore[method-assign]
    group.main(sock)
