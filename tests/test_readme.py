"""The README says what the committed result files say, and its commands and links exist."""

import re

from experiments import readme

README = (readme.ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_committed_results():
    """`python -m experiments.readme` brings them up to date."""
    assert readme.fill(README) == README


def test_every_figure_and_file_that_is_linked_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    assert len(links) > 5
    missing = [link for link in links if not (readme.ROOT / link).exists()]
    assert not missing


def test_every_flag_in_the_readme_exists():
    """A renamed flag must be renamed here too."""
    sources = ["train.py", "sample.py", "experiments/bench.py", "experiments/toy.py"]
    known = "".join((readme.ROOT / name).read_text(encoding="utf-8") for name in sources)
    commands = re.findall(r"^(?:pip install.* && )?python .*$", README, re.M)
    assert len(commands) >= 5
    for flag in re.findall(r"--(\w+)", "\n".join(commands)):
        assert re.search(rf"\b{flag}\b", known), flag
