"""What is counted of a router: how requests ended at which replica, and how the replicas stand."""

from quire.engine.families import Families
from quire.engine.router import Router, State


class Counts:
    """Names of replicas are the URLs that the router was started with."""

    def __init__(self, families: Families):
        self.families = families
        self.answers = families.counter(
            "quire:router_answers",
            "Requests by replica and how they ended there: served, refused (5xx), unreachable, broken",
            *("backend", "how"),
        )
        self.retries = families.counter(
            "quire:router_retries", "Requests that were sent to another replica before anything was answered"
        ).number()
        self.replays = families.counter(
            "quire:router_replays", "Streams that another replica went on with"
        ).number()
        self.lost = families.counter("quire:router_lost", "Answers that broke off").number()
        self.up = families.gauge("quire:router_backend_up", "Whether a replica takes requests", "backend")
        self.open = families.gauge("quire:router_backend_requests", "Requests that a replica has", "backend")
        self.queued = families.gauge(
            "quire:router_backend_queued_tokens",
            "Prompt tokens that wait there, as far as is known",
            "backend",
        )
        self.prompt = families.counter("quire:router_prompt_tokens", "Prompt tokens, about").number()
        self.cached = families.counter(
            "quire:router_cached_tokens", "Of these, those that were expected to be cached where they went"
        ).number()

    def read(self, router: Router, now: float) -> None:
        """Note how things stand."""
        for replica in router.replicas:
            able = replica.state is State.UP and replica.circuit.allows(now)
            self.up.number(replica.name).value = float(able)
            self.open.number(replica.name).value = replica.num_open + replica.others_running
            self.queued.number(replica.name).value = replica.queued_tokens + replica.others_tokens
        self.prompt.value, self.cached.value = router.num_prompt_tokens, router.num_cached_tokens
