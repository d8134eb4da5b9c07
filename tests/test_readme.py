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
    """Above 0 with 95 % confidence, by Student's t."""
    mean, error = mean_se(values)
    return mean > readme.T95[len(values)] * error


def alike(values: list[float]) -> bool:
    return not clear(values) and not clear([-x for x in values])


def gap(name: str, a: tuple, b: tuple) -> list[float]:
    """a minus b, seed by seed."""
    return readme.leads(ROWS, name, *({"method": m, "K": K} for m, K in (a, b)))


def lead(target: float, exo: str, dpo: str, K: int) -> list[float]:
    return readme.matched_lead(SWEEP["matched"], target, exo, dpo, K)


def test_seed_0_is_the_worst_of_dpo():
    on = readme.by_seed(ROWS, "on", method="dpo-rw", K=64)
    assert len(on) == 8
    assert min(on, key=on.get) == 0


def test_exo_commits_and_dpo_spreads_once_K_is_large():
    exo, dpo = ("exo-rw", 64), ("dpo-rw", 64)
    for name in ("on", "J"):
        assert clear(gap(name, exo, dpo))
    for name in ("modes", "between"):
        assert clear(gap(name, dpo, exo))
    for K in (2, 8):
        assert not clear(gap("J", ("exo-rw", K), ("dpo-rw", K)))


def test_each_ends_about_as_low_as_its_exact_gradient_and_neither_is_an_optimum():
    for name, sampled, exact in (
        ("reverse_kl", ("exo-rw", 64), "reverse-kl"),
        ("forward_kl", ("dpo-rw", 64), "forward-kl"),
    ):
        assert alike(gap(name, sampled, (f"{exact}-descent", None)))
        assert clear(gap(name, (f"{exact}-descent", None), (exact, None)))
    reverse, forward = ("reverse-kl", None), ("forward-kl", None)
    assert clear(gap("on", reverse, forward))
    assert clear(gap("modes", forward, reverse))
    assert clear(gap("reverse_kl", ("exo-rw", 64), forward))


def test_exo_leads_at_equal_distance_with_many_rewards_and_not_with_pairs():
    for target in (0.5, 1, 1.5, 2.5):
        assert clear(lead(target, "exo-rw", "dpo-rw", 64))
    assert clear(gap("reverse_kl", ("exo-pref", 2), ("dpo-pref", 2)))
    for target in (0.5, 1):
        assert alike(lead(target, "exo-pref", "dpo-pref", 2))


def test_who_draws_matters():
    assert alike(gap("reverse_kl", ("exo-online", 2), ("exo-online", 64)))
    assert clear(gap("on", ("dpo-online", 2), ("dpo-online", 64)))
    assert all(row["on"] > 0.95 for row in only(ROWS, method="dpo-online", K=2))
    means: dict[tuple, list[float]] = {}
    for row in ROWS:
        if row["K"]:
            means.setdefault((row["method"], row["K"]), []).append(row["reverse_kl"])
    assert min(means, key=lambda key: mean_se(means[key])[0]) == ("dpo-online", 8)


def test_the_floor_of_all_differences_is_what_the_page_says():
    """RLOO and on-policy EXO are one run but for rounding; the page calls 0.2 nats chance."""
    floors = [mean_se(gap("reverse_kl", ("rloo", K), ("exo-online", K)))[0] for K in (2, 8, 64)]
    assert 0.1 < max(map(abs, floors)) < 0.25


def test_mode_seeking_has_a_price_where_the_policy_is_wide():
    wide = {m: only(SWEEP["capacity"], method=m, K=64, n_embd=8) for m in ("exo-rw", "dpo-rw")}
    assert max(row["reverse_kl"] for row in wide["dpo-rw"]) < 0.1
    assert min(row["reverse_kl"] for row in wide["exo-rw"]) > 0.1
    caught = only(SWEEP["capacity"], method="exo-rw", n_embd=2, seed=0)[0]
    assert caught["asymmetry"] < 0.05


def test_exo_needs_K_more_the_further_it_has_come():
    def cosines(place, method, K):
        where = {"place": place, "method": method, "K": K}
        return readme.by_seed(SWEEP["directions"], "to_J", **where)

    for place in ("half-way", "near its end"):
        few, many = cosines(place, "exo-rw", 2), cosines(place, "exo-rw", 256)
        assert clear([many[seed] - few[seed] for seed in few])
    near, far = cosines("half-way", "exo-rw", 32), cosines("near its end", "exo-rw", 32)
    assert clear([near[seed] - far[seed] for seed in near])
    assert sum(x < 0 for x in cosines("half-way", "dpo-rw", 256).values()) == 5
    assert max(r["to_J_error"] for r in SWEEP["directions"]) < 0.05


def test_what_a_completion_buys():
    """EXO with many rewards, and everyone on own draws, have less regret at every budget."""
    rows = SWEEP["efficiency"]
    for budget in {row["completions"] for row in rows}:
        regret = {
            m: mean_se([r["regret"] for r in only(rows, method=m, completions=budget)])[0]
            for m in {row["method"] for row in rows}
        }
        ahead = [regret.pop(m) for m in ("exo-rw", "exo-online", "dpo-online", "rloo")]
        assert max(ahead) < min(regret.values())
