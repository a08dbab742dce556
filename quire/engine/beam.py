"""Beam search over the engine: every step is one token of every beam, and the prefix cache makes that cheap."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from quire.engine.engine import Engine
from quire.types import (
    BeamSearchOutput,
    BeamSearchParams,
    BeamSearchSequence,
    FinishReason,
    Prompt,
    Request,
    SamplingParams,
)


@dataclass(slots=True)
class Search:
    """One prompt's open beams and finished ones."""

    prompt: Request
    beams: list[BeamSearchSequence]
    done: list[BeamSearchSequence] = field(default_factory=list)


def beam_search(
    engine: Engine, prompts: Sequence[Prompt], params: BeamSearchParams
) -> list[BeamSearchOutput]:
    """The `beam_width` best continuations of each prompt, by cumulative log probability / length ** length_penalty.

    Each step keeps the best `2 * beam_width` candidates of each prompt, as Transformers' `generate` does.
    """
    step = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2 * params.beam_width, detokenize=False)
    names = (f"beam-{i}" for i in itertools.count())
    searches = []
    for prompt in prompts:
        request = engine.inputs.request(prompt, SamplingParams(temperature=0.0), request_id="beam")
        searches.append(Search(request, [BeamSearchSequence(list(request.prompt_token_ids), 0.0)]))
    for _ in range(params.max_tokens):
        open_searches = [s for s in searches if s.beams]
        if not open_searches:
            break
        _advance(engine, open_searches, step, params, names)
    return [_output(engine, search, params) for search in searches]


def _advance(
    engine: Engine,
    searches: Sequence[Search],
    step: SamplingParams,
    params: BeamSearchParams,
    names: Iterator[str],
) -> None:
    """One token more for every open beam of every search."""
    asked: dict[str, tuple[Search, BeamSearchSequence]] = {}
    for search in searches:
        for beam in search.beams:
            name = next(names)
            asked[name] = search, beam
            at, tokens = search.prompt.coordinates, tuple(beam.tokens)
            at = at and at.up_to(len(tokens))
            engine.add(replace(search.prompt, id=name, prompt_token_ids=tokens, params=step, coordinates=at))
    candidates: dict[int, list[BeamSearchSequence]] = {id(s): [] for s in searches}
    try:
        while not engine.idle:
            for output in engine.step():
                search, beam = asked.pop(output.request_id)
                for scores in output.outputs[0].logprobs or []:
                    for token, score in scores.items():
                        total, logprobs = beam.cum_logprob + score.logprob, [*beam.logprobs, scores]
                        longer = BeamSearchSequence([*beam.tokens, token], total, logprobs=logprobs)
                        candidates[id(search)].append(longer)
    finally:
        for name in asked:
            engine.abort(name)
    for search in searches:
        _keep_best(engine, search, candidates[id(search)], params)


def _keep_best(
    engine: Engine, search: Search, candidates: list[BeamSearchSequence], params: BeamSearchParams
) -> None:
    best = sorted(candidates, key=lambda b: -b.cum_logprob)[: 2 * params.beam_width]
    search.beams = []
    for rank, beam in enumerate(best):
        if beam.tokens[-1] in engine.inputs.eos_token_ids and not params.ignore_eos:
            if rank < params.beam_width:
                beam.finish_reason = FinishReason.STOP.value
                search.done.append(beam)
        elif len(search.beams) < params.beam_width:
            search.beams.append(beam)
    full = search.beams and len(search.beams[0].tokens) >= engine.inputs.max_length
    search.done.sort(key=lambda b: -_score(search, b, params))
    del search.done[params.beam_width :]
    settled = len(search.done) == params.beam_width and (
        not search.beams or _score(search, search.done[-1], params) >= _score(search, search.beams[0], params)
    )
    if settled or full:
        search.done += [] if settled else search.beams
        search.beams = []


def _score(search: Search, beam: BeamSearchSequence, params: BeamSearchParams) -> float:
    length = len(beam.tokens) - len(search.prompt.prompt_token_ids)
    return beam.cum_logprob / math.pow(length, params.length_penalty)


def _output(engine: Engine, search: Search, params: BeamSearchParams) -> BeamSearchOutput:
    best = sorted([*search.done, *search.beams], key=lambda b: -_score(search, b, params))[
        : params.beam_width
    ]
    for beam in best:
        beam.finish_reason = beam.finish_reason or FinishReason.LENGTH.value
        if engine.tokenizer is not None:
            beam.text = engine.tokenizer.decode(beam.tokens)
    return BeamSearchOutput(best)
