"""Rewards as a user would write them: --reward tests.rewards:letters. Tests put others beside it."""


def letters(prompt, completion):
    return float(completion.count("a"))
