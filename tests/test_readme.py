"""The README says what the committed result files say, and its commands and links exist."""

import re

import pytest

from experiments import readme
from experiments.common import mean_se, only

README = (readme.ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", readme.TABLES)
def test_tables_are_those_of_the_committed_results(page):
    """`python -m experiments.readme` brings them up to date."""
    assert readme.fill(page) == (readme.ROOT / page).read_text(encoding="utf-8")


def test_every_figure_and_file_that_is_linked_exists():
    for page in readme.TABLES:
        text = (readme.ROOT / page).read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
        assert len(links) > 3
        missing = [
            link for link in links if not (readme.ROOT / page).parent.joinpath(link).exists()
        ]
        assert not missing


def test_every_flag_in_the_readme_exists():
    """A renamed flag must be renamed here too."""
    sources = ["train.py", "sample.py", "experiments/bench.py"]
    known = "".join((readme.ROOT / name).read_text(encoding="utf-8") for name in sources)
    commands = re.findall(r"^(?:pip install.* && )?python .*$", README, re.M)
    assert len(commands) >= 5
    for flag in re.findall(r"--(\w+)", "\n".join(commands)):
        assert re.search(rf"\b{flag}\b", known), flag


# --------------------------------------------------------------------------------------------------
# What the sentences of "What was found" say in words


ROWS = readme.read("toy/results.json")["rows"]
SWEEP = readme.read("toy/sweep.json")


def clear(values: list[float]) -> bool:
    """More than twice their standard error above 0."""
    mean, error = mean_se(values)
    return mean > 2 * error


def lead(target, exo, dpo, K):
    where = ({"method": m, "K": K, "target": target} for m in (exo, dpo))
    return readme.leads(SWEEP["matched"], "reward", *where)


def gap(name, a, b):
    return readme.leads(ROWS, name, *({"method": m, "K": K} for m, K in (a, b)))


def test_exo_commits_and_dpo_spreads():
    exo, dpo = ("exo-rw", 64), ("dpo-rw", 64)
    assert clear(gap("on", exo, dpo))
    assert clear(gap("reward", exo, dpo))
    assert clear(gap("modes", dpo, exo))
    assert clear(gap("between", dpo, exo))


def test_each_goes_where_its_exact_gradient_goes():
    """No clear difference from it; and clear ones between the two directions' best fits."""
    for name, a, b in (
        ("reverse_kl", ("exo-rw", 64), ("reverse-kl-descent", None)),
        ("forward_kl", ("dpo-rw", 64), ("forward-kl-descent", None)),
    ):
        assert not clear(gap(name, a, b))
        assert not clear(gap(name, b, a))
    reverse, forward = ("reverse-kl", None), ("forward-kl", None)
    assert clear(gap("on", reverse, forward))
    assert clear(gap("modes", forward, reverse))
    assert clear(gap("modes", reverse, ("reverse-kl-descent", None)))


def test_exo_leads_at_equal_distance_with_many_rewards_and_not_with_pairs():
    for target in (1, 1.5, 2.5):
        assert clear(lead(target, "exo-rw", "dpo-rw", 64))
    assert clear(gap("reverse_kl", ("exo-pref", 2), ("dpo-pref", 2)))
    for target in (1, 1.5):
        pairs = lead(target, "exo-pref", "dpo-pref", 2)
        assert not clear(pairs)
        assert not clear([-x for x in pairs])
    assert clear(lead(0.5, "exo-rw", "dpo-rw", 2))
    far = {row["target"] for row in only(SWEEP["matched"], method="dpo-rw", K=2)}
    assert far == {0.5, 1.0}


def test_who_draws_matters():
    assert clear(gap("on", ("dpo-online", 2), ("dpo-online", 64)))
    assert all(row["on"] > 0.95 for row in only(ROWS, method="dpo-online", K=2))
    learners = [r for r in ROWS if r["K"]]
    means = {}
    for row in learners:
        means.setdefault((row["method"], row["K"]), []).append(row["reverse_kl"])
    assert min(means, key=lambda key: mean_se(means[key])[0]) == ("dpo-online", 8)


def test_mode_seeking_has_a_price_where_the_policy_is_wide():
    wide = {m: only(SWEEP["capacity"], method=m, K=64, n_embd=8) for m in ("exo-rw", "dpo-rw")}
    assert max(row["reverse_kl"] for row in wide["dpo-rw"]) < 0.1
    assert min(row["reverse_kl"] for row in wide["exo-rw"]) > 0.1


def test_exo_needs_K_more_the_further_it_has_come():
    def cosines(place, method, K):
        where = {"place": place, "method": method, "K": K}
        return readme.by_seed(SWEEP["directions"], "to_J", **where)

    for place in ("half-way", "near its end"):
        few, many = cosines(place, "exo-rw", 2), cosines(place, "exo-rw", 256)
        assert clear([many[seed] - few[seed] for seed in few])
    near, far = cosines("half-way", "exo-rw", 32), cosines("near its end", "exo-rw", 32)
    assert clear([near[seed] - far[seed] for seed in near])
    negative = [x for x in cosines("half-way", "dpo-rw", 256).values() if x < 0]
    assert len(negative) > 4
