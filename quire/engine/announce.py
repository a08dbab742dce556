"""Says who is in the batch before the device is touched, so that a witness knows whom a crash hit. Knows no tokens."""

from collections import Counter
from collections.abc import Callable

from quire.scheduler.loop import Device
from quire.scheduler.plan import Plan, Result

Announce = Callable[[list[str], list[str]], None]  # requests that take part from now on; that no longer do


class Announcer:
    """A device that calls `announce` before each launch that changes which requests take part.

    A request takes part while one of its sequences has a slot.
    """

    def __init__(self, device: Device, request_of: Callable[[int], str], announce: Announce):
        self.device, self.request_of, self.announce = device, request_of, announce
        self.at: dict[int, str] = {}  # slot -> request
        self.num_slots: Counter[str] = Counter()  # by request

    def launch(self, plan: Plan) -> object:
        """See `Device.launch`."""
        if plan.starts or plan.ends:
            self._tell(plan)
        return self.device.launch(plan)

    def sample(self, plan: Plan) -> Callable[[], Result]:
        """See `Device.sample`."""
        return self.device.sample(plan)

    def _tell(self, plan: Plan) -> None:
        was_in: dict[str, bool] = {}
        for slot in plan.ends:
            request = self.at.pop(slot)
            was_in.setdefault(request, True)
            self.num_slots[request] -= 1
        for start in plan.starts:
            request = self.at[start.slot] = self.request_of(start.seq)
            was_in.setdefault(request, self.num_slots[request] > 0)
            self.num_slots[request] += 1
        entered = [request for request, was in was_in.items() if self.num_slots[request] and not was]
        left = [request for request, was in was_in.items() if was and not self.num_slots[request]]
        for request in was_in:
            if not self.num_slots[request]:
                del self.num_slots[request]
        if entered or left:
            self.announce(entered, left)
