"""Rewards as a user would write them: --reward tests.rewards:letters. Tests put others there."""


def letters(prompt, completion):
    return float(completion.count("a"))
