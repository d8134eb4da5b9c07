"""What a user would write: --reward tests.rewards:letters (tests put others there), an encoding."""

import os

from data import byte_encoding
from infra.rows import InputError


def letters(prompt, completion):
    return float(completion.count("a"))


def spread(prompt, completion):
    """Unlike for nearly any two texts."""
    return completion.count("a") - 0.1 * len(completion)


def lonely():
    """An encoding that one process of two cannot make."""
    if os.environ["RANK"] == "1":
        raise InputError("only the second process knows this")
    return byte_encoding()
