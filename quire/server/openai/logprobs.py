"""Log probabilities in the two shapes of OpenAI's protocol: parallel lists, and a list of objects."""

from collections.abc import Sequence
from typing import Any

from quire.server.openai.params import finite
from quire.text.tokenizer import Tokenizer
from quire.types import Logprob

Scores = dict[int, Logprob]  # the token that is there first


class LogprobWriter:
    """Writes tokens as text, or as `token_id:7` where the request asks for that."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool):
        self.tokenizer, self.as_ids = tokenizer, as_ids or tokenizer is None

    def lists(self, rows: Sequence[Scores | None], tokens: Sequence[int], offset: int) -> dict[str, Any]:
        """For completions; `offset` is where the first token's text begins. A prompt's first token has none."""
        texts = [self._name(token, row) for token, row in zip(tokens, rows, strict=True)]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": [
                None if row is None else finite(row[token].logprob)
                for token, row in zip(tokens, rows, strict=True)
            ],
            "tokens": texts,
            "top_logprobs": [
                None if row is None else {self._name(t, row): finite(s.logprob) for t, s in row.items()}
                for row in rows
            ],
        }

    def objects(self, rows: Sequence[Scores], tokens: Sequence[int], num_top: int) -> dict[str, Any]:
        """For chat; `num_top` alternatives at each position, best first, -1 for all there are."""
        return {
            "content": [self._position(token, row, num_top) for token, row in zip(tokens, rows, strict=True)]
        }

    def _position(self, token: int, row: Scores, num_top: int) -> dict[str, Any]:
        ranked = sorted(row, key=lambda t: row[t].rank or 0)
        best = ranked if num_top < 0 else ranked[:num_top]
        return {**self._entry(token, row), "top_logprobs": [self._entry(t, row) for t in best]}

    def _entry(self, token: int, row: Scores) -> dict[str, Any]:
        entry = {"token": self._name(token, row), "logprob": finite(row[token].logprob), "bytes": None}
        if self.tokenizer is not None:
            entry["bytes"] = list(self.tokenizer.token_bytes(token))
        return entry

    def _name(self, token: int, row: Scores | None) -> str:
        if self.as_ids or self.tokenizer is None:
            return f"token_id:{token}"
        known = None if row is None else row[token].decoded_token
        return self.tokenizer.token_text(token) if known is None else known
