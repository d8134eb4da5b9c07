"""
The tables of the pages, and the numbers in their sentences, from the result files in assets/ (the
table of bugs: from the docstrings of its tests).

    python -m experiments.readme        writes them into the pages

A table stands between <!-- name --> and <!-- end name -->. A paragraph with measured numbers is
followed by a comment that names them, in order:

    EXO has 98 ± 0 % of its mass on bumps, DPO 71 ± 3 %.
    <!-- = toy.rows.on(method=exo-rw,K=64) toy.rows.on(method=dpo-rw,K=64) -->

FILE.LIST.COLUMN(where): mean ± standard error, over seeds, of a column of the rows that are so, or,
with method=A|B, of A minus B, paired by seed. tests/test_readme.py fails while pages and files
disagree, and where a sentence has a ± that no comment names.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from experiments.common import mean_se, only

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "QUESTIONS.md", "CONTRIBUTING.md", "experiments/README.md")
FILES = {
    "toy": "toy/results.json",
    "sweep": "toy/sweep.json",
    "text": "text/results.json",
    "bench": "bench/results.json",
}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t
DATA = {name: json.loads((ROOT / "assets" / path).read_bytes()) for name, path in FILES.items()}
TOY, SWEEP, TEXT, BENCH = DATA.values()

# --------------------------------------------------------------------------------------------------
# Numbers

SHARES = ("on", "between", "producible", "praise", "win_oracle_sft", "win_rm_sft")  # in percent


def number(column: str, values: list[float], sign: str = "") -> str:
    """Mean ± standard error; the mean alone of one value; a dash of none."""
    if not values:
        return "–"
    share = column in SHARES
    digits = 0 if share else 1 if column == "modes" else 2
    mean, error = (100 * x if share else x for x in mean_se(values))
    text = f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")
    return text + " %" * share


def values(rows: list[dict], column: str, **where) -> dict[int, float]:
    """{seed: value} of the rows that are so."""
    return {row["seed"]: row[column] for row in only(rows, **where)}


def gap(rows: list[dict], column: str, ours: dict, theirs: dict) -> list[float]:
    """Differences over the seeds that both have, so that what worlds share cancels."""
    a, b = values(rows, column, **ours), values(rows, column, **theirs)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def literal(text: str) -> object:
    """64 is a number, null is None, near_its_end is text with spaces."""
    try:
        return json.loads(text)
    except ValueError:
        return text.replace("_", " ")


def named(field: str) -> str:
    """The number that FILE.LIST.COLUMN(where) names."""
    file, rows, column, inside = re.fullmatch(r"(\w+)\.(\w+)\.(\w+)\((.*)\)", field).groups()
    rows, where = DATA[file][rows], dict(pair.split("=") for pair in inside.split(","))
    sides = [{k: literal(v.split("|")[-i]) for k, v in where.items()} for i in (0, 1)]
    if "|" not in inside:
        return number(column, list(values(rows, column, **sides[0]).values()))
    found = gap(rows, column, *sides)
    return number(column, found, "+") + (f" ({len(found)} seeds)" if "target" in where else "")


NUMBER = r"[-+]?\d+(?:\.\d+)? ± \d+(?:\.\d+)?(?: %)?(?: \(\d seeds\))?"
NAMED = re.compile(r"(?P<prose>(?:.+\n)+?)(?P<comment> *<!-- = (?P<fields>[^>]+) -->)")


def fill_numbers(text: str) -> str:
    """Every paragraph before a comment that names its numbers, with these numbers."""

    def paragraph(match: re.Match) -> str:
        fields, prose = match["fields"].split(), match["prose"]
        count = len(re.findall(NUMBER, prose))
        assert count == len(fields), f"{count} numbers, {len(fields)} names: {prose}"
        numbers = map(named, fields)
        return re.sub(NUMBER, lambda _: next(numbers), prose) + match["comment"]

    return NAMED.sub(paragraph, text)


# --------------------------------------------------------------------------------------------------
# Tables


def markdown(corner: str, lines: dict[str, dict[str, str]]) -> str:
    """{line: {column: cell}} -> a table; a dash where a line lacks a column."""
    heads = list(dict.fromkeys(head for cells in lines.values() for head in cells))
    rows = [[corner, *heads], ["---"] + ["---:"] * len(heads)]
    rows += [[name, *(cells.get(head, "–") for head in heads)] for name, cells in lines.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def pivot(corner: str, rows: list[dict], line: str, head: str, cell: Callable) -> str:
    """A table with a cell for all rows that agree in `line` and `head`, which their fields fill."""
    lines: dict[str, dict] = {}
    for row in rows:
        name, column = (text.format(**row).replace(", K = None", "") for text in (line, head))
        lines.setdefault(name, {}).setdefault(column, []).append(row)
    filled = {name: {k: cell(own) for k, own in cells.items()} for name, cells in lines.items()}
    return markdown(corner, filled)


def of(column: str, counted: bool = False) -> Callable:
    """A cell: number(column), and how many seeds there are."""

    def cell(own: list[dict]) -> str:
        text = number(column, [row[column] for row in own])
        return text + f" ({len(own)})" * counted

    return cell


def shown(own: list[dict]) -> str:
    """A cell of rows that `long` made."""
    return number(own[0]["column"], [row["value"] for row in own], own[0].get("sign", ""))


def long(rows: list[dict], *columns: str) -> list[dict]:
    """A row for each of these columns."""
    names = [{"column": column, "title": TITLES[column]} for column in columns]
    return [row | name | {"value": row[name["column"]]} for row in rows for name in names]


TITLES = {
    "reverse_kl": "KL(π‖π*)",
    "forward_kl": "KL(π*‖π)",
    "reward": "E[r]",
    "kl_sft": "KL(π‖sft)",
    "J": "J",
    "on": "on a bump",
    "between": "on crossings",
    "modes": "bumps held",
    "entropy": "entropy",
}
METHOD = "{method}, K = {K}"
RIVALS = [(f"exo-{kind}", f"dpo-{kind}", K) for kind in ("rw", "online") for K in (2, 8, 64)]
RIVALS += [(f"exo-{kind}", f"dpo-{kind}", 2) for kind in ("pref", "online-pref")]
RIVALS += [("exo-pref-1e-3", "dpo-pref", 2), ("reverse-kl-descent", "forward-kl-descent", None)]


def paired() -> str:
    """The differences that the table of all methods cannot show: seeds differ more than methods."""
    pairs = [((b, K), (a, K)) for a, b, K in RIVALS]
    pairs += [(("rloo", K), ("exo-online", K)) for K in (2, 8, 64)]
    pairs += [(("exo-rw", 64), ("reverse-kl-descent", None))]
    pairs += [(("dpo-rw", 64), ("forward-kl-descent", None))]
    pairs += [(("forward-kl", None), ("reverse-kl", None))]
    rows = []
    for pair in pairs:
        sides = [{"method": method, "K": K} for method, K in pair]
        name = " minus ".join(METHOD.format(**side) for side in sides)
        for c in ("reverse_kl", "forward_kl", "reward", "on", "modes"):
            more = {"name": name, "title": TITLES[c], "column": c, "sign": "+"}
            rows += [more | {"value": value} for value in gap(TOY["rows"], c, *sides)]
    return pivot("", rows, "{name}", "{title}", shown)


def lead(target: float, exo: str, dpo: str, K: int | None) -> list[float]:
    """EXO's in E[r] at equal KL(pi || sft), over the seeds where both got there."""
    sides = ({"method": m, "K": K, "target": target} for m in (exo, dpo))
    return gap(SWEEP["matched"], "reward", *sides)


def leads() -> str:
    lines = {}
    for exo, dpo, K in RIVALS:
        found = {t: lead(t, exo, dpo, K) for t in (0.5, 1, 1.5, 2, 2.5)}
        name = METHOD.format(method=exo, K=K).replace(", K = None", "")
        lines[f"{name}, over {dpo}"] = {
            f"KL {t:g}": f"{number('reward', x, '+')} ({len(x)})" for t, x in found.items() if x
        }
    return markdown("lead in E[r]", lines)


def directions() -> str:
    rows = [row for row in SWEEP["directions"] if row["K"] in (2, 8, 32, 128)]
    return pivot("cosine with the gradient of J", rows, "{place}", METHOD, of("to_J"))


def capacity() -> str:
    methods = ("exo-rw", "dpo-rw", "reverse-kl", "forward-kl")
    rows = [row for row in SWEEP["capacity"] if row["method"] in methods and row["K"] in (64, None)]
    rows = long(rows, "reverse_kl") + long(rows, "modes")
    return pivot("n_embd", rows, "{n_embd}", "{title}: {method}", shown)


def efficiency() -> str:
    def cell(own: list[dict]) -> str:
        return f"{of('regret')(own)} (K {own[0]['K']})"

    return pivot("regret", SWEEP["efficiency"], "{method}", "{completions:,} completions", cell)


def text_world(reward: str) -> str:
    """Trained policies as they were judged: oracle reward at their KL, and share well formed."""

    def cell(own: list[dict]) -> str:
        return f"{of('oracle')(own)} at KL {of('kl')(own)}; {of('producible')(own)}"

    last = only(TEXT["rows"], last=True, n_pairs=None, reward=reward, n_embd=48)
    return pivot(reward, last, "{method}", "β {beta:g}", cell)


def text_leads() -> str:
    """EXO's lead over its DPO in oracle reward, paired over seeds: 95 % intervals."""

    def cell(own: list[dict]) -> str:
        half = T95[own[0]["lead_seeds"]] * own[0]["lead_se"]
        return f"{own[0]['lead']:+.2f} ± {half:.2f}"

    rows = [r for r in TEXT["matched"] if r["kl"] in (0.5, 1) and r.get("lead_seeds", 0) > 1]
    return pivot("lead over its DPO", rows, "{method}", "{reward}, KL {kl:g}", cell)


def bench() -> str:
    """Speed beside the others: ratios of medians measured in one run."""
    lines = {}
    for row in BENCH["rows"]:
        unit = "tokens/s" if row["what"] == "sample" else "groups/s"
        what = f"{row['what']} {row['size']}"
        if row["what"] == "train":
            what += f", prompt {row['prompt']}, K = {row['K']}"
        if row["what"] != "load":
            what += f", {row['dtype']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
        others = {"naive": row["naive"], **row["peers"]}
        lines[what] = {
            "ours": f"{row['ours']:,.3g} {unit}",
            "as fast as the others": ", ".join(
                f"{row['ours'] / v:.1f}× {name}" for name, v in others.items() if v
            ),
            "of the matmul limit": f"{row['limit_share']:.0%}" if row["limit_share"] else "–",
            "GB": f"{row['peak_gb']:.2f}" if row["peak_gb"] else "–",
        }
    return markdown("", lines)


def scaling(axis: str) -> str:
    """What grows with K, length or vocabulary."""
    names = {"seconds_per_group": "seconds a group", "peak_gb": "GB", "naive_peak_gb": "GB, naive"}
    rows = BENCH["scaling"][axis]
    lines = {
        title: {f"{row[axis]:,}": f"{row[name]:.3g}" for row in rows if row.get(name)}
        for name, title in names.items()
    }
    return markdown(axis, {title: cells for title, cells in lines.items() if cells})


def bugs() -> str:
    """The docstrings of tests/test_classic_bugs.py: bug, where it was met, what must hold."""
    source = (ROOT / "tests/test_classic_bugs.py").read_text(encoding="utf-8")
    parts = re.compile(r"(.+?) Met in: (.+?)\. Must hold: (.+)")
    thread = re.compile(r"([\w.-]+)/([\w.-]+)#(\d+)")
    rows = ["| bug | met in | what must hold | test |", "| --- | --- | --- | --- |"]
    for name, text in re.findall(r'^def (test_\w+).*\n    """((?:.|\n)+?)"""', source, re.M):
        bug, met, holds = parts.fullmatch(" ".join(text.split())).groups()
        met = thread.sub(r"[\1/\2 #\3](https://github.com/\1/\2/issues/\3)", met)
        rows.append(f"| {bug} | {met} | {holds} | `{name}` |")
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {
    "exact": lambda: pivot("", long(TOY["rows"], *TITLES), METHOD, "{title}", shown),
    "paired": paired,
    "matched": lambda: pivot(
        "E[r]", SWEEP["matched"], METHOD, "KL {target:g}", of("reward", counted=True)
    ),
    "leads": leads,
    "directions": directions,
    "capacity": capacity,
    "efficiency": efficiency,
    "text sentiment": lambda: text_world("sentiment"),
    "text conviction": lambda: text_world("conviction"),
    "text leads": text_leads,
    "bench": bench,
    "scaling K": lambda: scaling("K"),
    "scaling longest": lambda: scaling("longest"),
    "scaling vocab_size": lambda: scaling("vocab_size"),
    "bugs": bugs,
}


def fill(page: str) -> str:
    """A page with its tables and numbers as the files have them."""

    def table(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end {match[1]} -->"

    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"<!-- ([\w ]+) -->\n(?:.*\n)*?<!-- end \1 -->", table, text)
    return fill_numbers(text)


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(fill(page), encoding="utf-8")
