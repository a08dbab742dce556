"""Gives conversations the roles that a template writes: agents send more than many templates expect. Knows no Jinja.

Instructions (of the roles system and developer) come several at once and after the beginning, and messages of the
user's follow each other. Templates refuse such conversations, or leave a message out without a word.
"""

from collections.abc import Callable, Sequence
from typing import Any

INSTRUCTIONS = ("system", "developer")
Message = dict[str, Any]
Writes = Callable[..., bool]


def fitted(messages: Sequence[Message], writes: Writes) -> Sequence[Message]:
    """The messages, as they are if the template writes them so.

    Else instructions at the beginning become one message of the system's, or the user's where there is no system; later
    ones the user's; and neighbouring messages of the user's one.

    Args:
        messages: as `quire.text.messages.conversation` makes them.
        writes: whether the template writes each of some messages of these roles, and refuses none.
    """
    roles = [message["role"] for message in messages]
    num_first = next((i for i, role in enumerate(roles) if role not in INSTRUCTIONS), len(roles))
    later = {role for role in roles[num_first:] if role in INSTRUCTIONS}
    runs = any(pair == ("user", "user") for pair in zip(roles, roles[1:], strict=False))
    plain = num_first == 0 or roles[:num_first] == ["system"]
    if (plain and not later and not runs) or not writes("user"):
        return messages
    first, rest = list(messages[:num_first]), list(messages[num_first:])
    if not plain and not writes(*roles[:num_first], "user"):
        first = [_joined({**first[0], "role": "system"}, first[1:])]
    if first and not writes("system", "user") and first[0]["role"] == "system":
        first, rest = [], [*({**message, "role": "user"} for message in first), *rest]
    told = {role for role in later if not writes("user", role, "assistant", "user")}
    rest = [{**message, "role": "user"} if message["role"] in told else message for message in rest]
    return first + (rest if writes("user", "user") else _without_runs(rest))


def _without_runs(messages: Sequence[Message]) -> list[Message]:
    found: list[Message] = []
    for message in messages:
        if found and found[-1]["role"] == message["role"] == "user":
            found[-1] = _joined(found[-1], [message])
        else:
            found.append(message)
    return found


def _joined(head: Message, more: Sequence[Message]) -> Message:
    """With the texts of the others; as parts if one of them has parts."""
    contents = [message.get("content", "") for message in (head, *more)]
    if all(isinstance(content, str) for content in contents):
        return {**head, "content": "\n\n".join(contents)}
    parts = [[{"type": "text", "text": each}] if isinstance(each, str) else each for each in contents]
    return {**head, "content": [part for each in parts for part in each]}
