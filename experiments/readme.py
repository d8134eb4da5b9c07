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
disagree, and where a sentence has a ± that no comment names. Of the text world ± is half of a
95 % interval.
"""

import json
import math
import re
from pathlib import Path

import numpy as np

from experiments.common import distinct, mean_se, only

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "QUESTIONS.md", "CONTRIBUTING.md", "experiments/README.md")
FILES = {
    "toy": "toy/results.json",
    "sweep": "toy/sweep.json",
    "text": "text/results.json",
    "again": "text/again.json",  # one of its questions, with other seeds
    "bench": "bench/results.json",
}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t
DATA = {name: json.loads((ROOT / "assets" / path).read_bytes()) for name, path in FILES.items()}
TOY, SWEEP, TEXT, AGAIN, BENCH = DATA.values()

# --------------------------------------------------------------------------------------------------
# Numbers

SHARES = ("on", "between", "well_formed", "win_oracle", "win_rm")  # in percent
SHARES += ("praise", "pan", "mixed", "opposed", "rm_accuracy")


def number(column: str, values: list[float], sign: str = "", scale: float = 1.0) -> str:
    """Mean ± standard error times scale; the mean alone of one value."""
    share = column in SHARES
    digits = 0 if share else 1 if column == "modes" else 2
    mean, error = (100 * x if share else x for x in mean_se(values))
    text = f"{mean:{sign}.{digits}f}"
    text += f" ± {scale * error:.{digits}f}" if len(values) > 1 else ""
    return text + " %" * share


def values(rows: list[dict], column: str, **where) -> dict[int, float]:
    """{seed: value} of the rows that are so."""
    return {row["seed"]: row[column] for row in only(rows, **where)}


def gap(rows: list[dict], column: str, ours: dict, theirs: dict) -> list[float]:
    """Differences over the seeds that both have, so that what worlds share cancels."""
    a, b = values(rows, column, **ours), values(rows, column, **theirs)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def lead(target: float, exo: str, dpo: str, K: int | None) -> list[float]:
    """EXO's in E[r] at equal KL(pi || sft), over the seeds where both got there."""
    sides = ({"method": m, "K": K, "target": target} for m in (exo, dpo))
    return gap(SWEEP["matched"], "reward", *sides)


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
    apart = "|" in inside
    found = gap(rows, column, *sides) if apart else [*values(rows, column, **sides[0]).values()]
    scale = T95[len(found)] if file in ("text", "again") else 1.0
    seeds = f" ({len(found)} seeds)" if apart and "target" in where else ""
    return number(column, found, "+" if apart else "", scale) + seeds


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


def together(rows: list[dict], *texts: str) -> dict[tuple, list[dict]]:
    """Rows that agree in all these texts, which their fields fill."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(text.format(**row).replace(", K = None", "") for text in texts)
        groups.setdefault(key, []).append(row)
    return groups


def pivot(corner: str, rows: list[dict], line: str, cells: dict[str, str]) -> str:
    """A table with a cell for all rows that agree in their line and head, as in together. `cells`
    is {head: text}, where {COLUMN} is the number of a column, {n} how many rows there are, and
    {first[COLUMN]} what the first of them has."""
    lines: dict[str, dict] = {}
    for head, text in cells.items():
        columns = [column for column in re.findall(r"{(\w+)}", text) if column != "n"]
        for (name, title), own in together(rows, line, head).items():
            numbers = {column: number(column, [row[column] for row in own]) for column in columns}
            cell = text.format(n=len(own), first=own[0], **numbers)
            lines.setdefault(name, {})[title] = cell
    return markdown(corner, lines)


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


def titled(method: str, K: int | None) -> str:
    return METHOD.format(method=method, K=K) if K else method


def paired() -> str:
    """The differences that the table of all methods cannot show: seeds differ more than methods."""
    pairs = [((dpo, K), (exo, K)) for exo, dpo, K in RIVALS]
    pairs += [(("rloo", K), ("exo-online", K)) for K in (2, 8, 64)]
    pairs += [(("exo-rw", 64), ("reverse-kl-descent", None))]
    pairs += [(("dpo-rw", 64), ("forward-kl-descent", None))]
    pairs += [(("forward-kl", None), ("reverse-kl", None))]
    lines = {}
    for pair in pairs:
        sides = [{"method": method, "K": K} for method, K in pair]
        lines[" minus ".join(titled(*who) for who in pair)] = {
            TITLES[column]: number(column, gap(TOY["rows"], column, *sides), "+")
            for column in ("reverse_kl", "forward_kl", "reward", "on", "modes")
        }
    return markdown("", lines)


def leads() -> str:
    lines = {}
    for exo, dpo, K in RIVALS:
        found = {t: lead(t, exo, dpo, K) for t in (0.5, 1, 1.5, 2, 2.5)}
        lines[f"{titled(exo, K)}, over {dpo}"] = {
            f"KL {t:g}": f"{number('reward', x, '+')} ({len(x)})" for t, x in found.items() if x
        }
    return markdown("lead in E[r]", lines)


def directions() -> str:
    rows = [row for row in SWEEP["directions"] if row["K"] in (2, 8, 32, 128)]
    return pivot("cosine with the gradient of J", rows, "{place}", {METHOD: "{to_J}"})


def capacity() -> str:
    methods = ("exo-rw", "dpo-rw", "reverse-kl", "forward-kl")
    rows = [row for row in SWEEP["capacity"] if row["method"] in methods and row["K"] in (64, None)]
    cells = {"KL(π‖π*): {method}": "{reverse_kl}", "bumps held: {method}": "{modes}"}
    return pivot("n_embd", rows, "{n_embd}", cells)


def told(column: str, found: list[float]) -> str:
    """A mean over seeds, and the median where it is elsewhere, because one run carries the mean."""
    digits = ".0%" if column in SHARES else ".2f"
    mean, median = np.mean(found), np.median(found)
    text = f"{mean:{digits}}"
    if abs(mean - median) > (0.03 if column in SHARES else 0.15):
        text += f", median {median:{digits}}"
    return text.replace("%", " %")


def text_cells(reward: str, cells: dict[str, str], names=None, **which) -> str:
    """A line for each method, π* below them, of policies at equal KL: {head: text} as in pivot,
    with means for numbers; in brackets how many seeds arrived, if not all did."""
    where, seeds = {"reward": reward, "labels": 0}, TEXT["settings"]["matrix"]["seeds"]
    rows = only(TEXT["cells"], **where, **which)
    best = [{**row, "method": "π*", "K": 0} for row in only(TEXT["optimum"], **where)]
    rows += [row for row in best if row["target"] in distinct(rows, "target")]
    there = {row["method"] for row in rows}
    names = names or [name for name in (*TEXT["settings"]["methods"], "π*") if name in there]
    rows = [row for row in rows if row["method"] in names]
    rows.sort(key=lambda row: (row["target"], row["K"]))
    heads = [head for text in cells for (head,) in together(rows, text)]
    lines = {name: dict.fromkeys(heads, "–") for name in names}
    for head, text in cells.items():
        columns = re.findall(r"{(\w+)}", text)
        for (name, title), own in together(rows, "{method}", head).items():
            means = {column: told(column, [row[column] for row in own]) for column in columns}
            lines[name][title] = text.format(**means) + f" ({len(own)})" * (len(own) < seeds)
    return markdown(reward, lines)


WON = {"win_rm": "by the reward model", "win_oracle": "by the oracle", "opposed": "opposed pairs"}


def text_compared(question: str, data: dict) -> str:
    """Paired differences: mean ± half of the 95 % interval; bold where p by Holm is below 0.05; how
    far apart in KL the two sides are, over their targets."""
    lines: dict[str, dict[str, str]] = {}
    rows = only(data["compared"], question=question)
    heads = [f"KL {target:g}" for target in sorted(distinct(rows, "target"))]
    for row in rows:
        share = row["quantity"] in SHARES
        scale, digits = (100, 0) if share else (1, 2)
        cell = (
            f"{scale * row['mean']:+.{digits}f} ± {scale * row['half']:.{digits}f}" + " %" * share
        )
        cell = f"**{cell}**" if row["holm"] < 0.05 else cell
        cell += f" ({row['seeds']})" * (row["seeds"] < data["settings"]["matrix"]["seeds"])
        sides = [f"{row[who]}, K = {row[K]}" for who, K in (("ours", "K"), ("theirs", "K_theirs"))]
        name = " − ".join(sides if question == "K" else (row["ours"], row["theirs"]))
        name += f", {WON[row['quantity']]}" if share else ""
        line = lines.setdefault(name, dict.fromkeys(heads, "–"))
        line[f"KL {row['target']:g}"] = cell
        line["apart in KL"] = line.get("apart in KL", "") + f" {100 * row['kl_gap']:+.0f}"
    for line in lines.values():
        line["apart in KL"] = ", ".join(line.pop("apart in KL").split()) + " %"
    return markdown("", lines)


def text_turns() -> str:
    """Of each grid the policy with the highest oracle reward, and the one farthest out: medians
    over seeds. A seed has turned if the oracle prefers the one and the reward model the other."""
    lines, grids = {}, only(TEXT["fits"], grid=True)
    which = distinct(grids, "method", "labels")
    for method, labels in sorted(which, key=lambda pair: (pair[0], pair[1] or math.inf)):
        own = only(grids, method=method, labels=labels)
        ends = [
            [max(only(own, seed=seed), key=lambda row: row[name]) for name in ("oracle", "kl")]
            for seed in distinct(own, "seed")
        ]
        turned = sum(a["oracle"] > b["oracle"] and a["rm"] < b["rm"] for a, b in ends)
        line = lines.setdefault(f"{method}, {labels or 'all'} labels", {})
        for head, rows in zip(("best", "farthest"), zip(*ends, strict=True), strict=True):
            middle = {k: np.median([row[k] for row in rows]) for k in ("oracle", "kl", "rm")}
            line[f"{head}: oracle"] = "{oracle:.2f} at KL {kl:.2f}".format(**middle)
            line[f"{head}: reward model"] = "{rm:.2f}".format(**middle)
            formed = np.median([row["well_formed"] for row in rows])
            line[f"{head}: well formed"] = f"{100 * formed:.0f} %"
        line["turned"] = f"{turned} of {len(ends)}"
    return markdown("", lines)


def bench() -> str:
    """Speed beside the others: ratios of medians measured in one run."""
    lines = {}
    for row in BENCH["rows"]:
        what = f"{row['what']} {row['size']}"
        if row["what"] == "train":
            what += f", prompt {row['prompt']}, K = {row['K']}"
        if row["what"] != "load":
            what += f", {row['dtype']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
        others = {"naive": row["naive"], **row["peers"]}
        ratios = [f"{row['ours'] / theirs:.1f}× {who}" for who, theirs in others.items() if theirs]
        lines[what] = {"ours": f"{row['ours']:,.3g} {row['unit']}"}
        lines[what] |= {"as fast as the others": ", ".join(ratios)} if ratios else {}
        for column, head, digits in LIMITS:
            lines[what] |= {head: f"{row[column]:{digits}}"} if row[column] else {}
    return markdown("", lines)


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


AT = "KL {target:g}"
MODES = {
    "praise": "{praise}",
    "mixed": "{mixed}",
    "pan": "{pan}",
    "well formed": "{well_formed}",
    "opposed pairs": "{opposed}",
    "oracle reward": "{oracle}",
}
LIMITS = (("limit_share", "of the matmul limit", ".0%"), ("peak_gb", "GB", ".2f"))
TABLES = {
    "exact": lambda: pivot("", TOY["rows"], METHOD, {TITLES[c]: f"{{{c}}}" for c in TITLES}),
    "paired": paired,
    "matched": lambda: pivot("E[r]", SWEEP["matched"], METHOD, {"KL {target:g}": "{reward} ({n})"}),
    "leads": leads,
    "directions": directions,
    "capacity": capacity,
    "efficiency": lambda: pivot(
        "regret",
        SWEEP["efficiency"],
        "{method}",
        {"{completions:,} completions": "{regret} (K {first[K]})"},
    ),
    "text methods": lambda: text_cells("sentiment", {AT: "{oracle}; {well_formed}"}, K=8),
    "text methods compared": lambda: text_compared("methods", TEXT),
    "text again": lambda: text_compared(AGAIN["settings"]["matrix"]["questions"][0], AGAIN),
    "text draws compared": lambda: text_compared("draws", TEXT),
    "text wins": lambda: text_cells("sentiment", {AT: "{win_rm}; {win_oracle}"}, K=8),
    "text wins compared": lambda: text_compared("wins", TEXT),
    "text turns": text_turns,
    "text K": lambda: text_cells(
        "sentiment", {"K = {K}": "{oracle}; {well_formed}"}, ("exo-rw", "dpo-rw"), target=1.0
    ),
    "text K compared": lambda: text_compared("K", TEXT),
    "text modes": lambda: text_cells("conviction", MODES),
    "text modes compared": lambda: text_compared("modes", TEXT),
    "bench": bench,
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
