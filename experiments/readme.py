"""
The README's tables, made from the result files in assets/, so that they cannot drift.

    python -m experiments.readme        writes them between the README's markers

tests/test_readme.py fails while the two disagree.
"""

import functools
import json
import statistics
from pathlib import Path

from experiments.frontier import CALIBRATION
from experiments.frontier_report import only

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> dict:
    return json.loads((ROOT / "assets" / name).read_text(encoding="utf-8"))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def named(row: dict) -> str:
    return row["method"] + (f", K = {row['K']}" if row["K"] else "")


def numbers() -> str:
    """The numbers world: every method, mean ± standard error over seeds."""
    found: dict[str, list[dict]] = {}
    for row in read("toy/results.json")["rows"]:
        found.setdefault(named(row), []).append(row)
    columns = ("reverse_kl", "forward_kl", "J", "reward", "kl_sft")
    rows = [[name, *(spread([r[c] for r in rs]) for c in columns)] for name, rs in found.items()]
    return markdown(["", "KL(π‖π*)", "KL(π*‖π)", "J", "E[r]", "KL(π‖sft)"], rows)


def paired() -> str:
    """Differences over the same seeds, so that what worlds share cancels."""
    rows = read("toy/results.json")["rows"]

    def column(method: str, K: int | None, name: str) -> list[float]:
        return [r[name] for r in rows if (r["method"], r["K"]) == (method, K)]

    pairs = [("reverse_kl", "dpo-rw", K, "exo-rw", K) for K in (2, 8, 64)]
    pairs += [("reverse_kl", "exo-rw", 64, "reverse-kl", None)]
    pairs += [("reverse_kl", "exo-online", 2, "reverse-kl", None)]
    pairs += [("forward_kl", "dpo-rw", 64, "forward-kl", None)]
    pairs += [("reverse_kl", "exo-pref", 2, "dpo-pref", 2)]
    out = []
    for name, a, K, b, L in pairs:
        gap = [x - y for x, y in zip(column(a, K, name), column(b, L, name), strict=True)]
        what = {"reverse_kl": "KL(π‖π*)", "forward_kl": "KL(π*‖π)"}[name]
        labels = [named({"method": m, "K": k}) for m, k in ((a, K), (b, L))]
        out.append([f"{what}: {labels[0]} minus {labels[1]}", spread(gap)])
    return markdown(["at equal beta, paired over seeds", "difference"], out)


def matched() -> str:
    """E[r] at equal distance from sft: EXO's lead over DPO, where all seeds of both arrive."""
    rows, out = read("toy/sweep.json")["matched"], {}
    rivals = {"exo": "dpo", "reverse": "forward"}
    arrived = {(r["method"], r["K"], r["kl_sft"]): r["seeds"] for r in rows}
    for row in rows:
        head, _, tail = row["method"].partition("-")
        rival = arrived.get((f"{rivals.get(head)}-{tail}", row["K"], row["kl_sft"]), 0)
        if "lead" in row:
            text = f"{row['lead']:+.3f} ± {row['lead_se']:.3f}"
            found = out.setdefault(named(row), {})
            found[row["kl_sft"]] = text if min(rival, row["seeds"]) == 8 else f"{rival} of 8 arrive"
    budgets = sorted({row["kl_sft"] for row in rows})
    table = [[name, *(found.get(b, "–") for b in budgets)] for name, found in out.items()]
    return markdown(["lead in E[r]", *(f"KL {b:g}" for b in budgets)], table)


def bench() -> str:
    """Speed beside the others: ratios of medians measured in one run."""
    out = []
    for row in read("bench/results.json")["rows"]:
        unit = "tokens/s" if row["what"] == "sample" else "groups/s"
        what = f"{row['what']} {row['size']}"
        if row["what"] == "train":
            what += f", prompt {row['prompt']}, K = {row['K']}"
        if row["what"] != "load":
            what += f", {row['dtype']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
        others = {"naive": row["naive"], **row["peers"]}
        times = ", ".join(f"{row['ours'] / v:.1f}× {k}" for k, v in others.items() if v)
        limit = f"{row['limit_share']:.0%}" if row["limit_share"] else "–"
        peak = f"{row['peak_gb']:.2f}" if row["peak_gb"] else "–"
        out.append([what, f"{row['ours']:,.3g} {unit}", times, limit, peak])
    return markdown(["", "ours", "as fast as the others", "of the matmul limit", "GB"], out)


def scaling() -> str:
    """What grows with what: time with K and length, memory hardly with the vocabulary."""
    found, out = read("bench/results.json")["scaling"], []
    names = {"K": "completions K", "longest": "completion length", "vocab_size": "vocabulary"}
    for axis, rows in found.items():
        points = [f"{row[axis]:,}" for row in rows]
        out.append([names[axis], *points])
        if axis == "vocab_size":
            out.append(["GB, ours", *(f"{row['peak_gb']:.2f}" for row in rows)])
            out.append(["GB, naive", *(f"{row['naive_peak_gb']:.2f}" for row in rows)])
        else:
            times = (f"{1000 * row['seconds_per_group']:.0f}" for row in rows)
            out.append(["ms per group", *times])
    width = max(map(len, out))
    return markdown(["", *[""] * (width - 1)], [row + [""] * (width - len(row)) for row in out])


CALIBRATED = 0.25  # the largest KL of the table
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's t, by the number of seeds


def text_methods(done: dict) -> list[str]:
    return ["optimum", *dict.fromkeys(row["method"] for row in done["reach"])]


def seeded(row: dict, name: str, all_seeds: int) -> str:
    """Mean ± standard error, which one seed has not; and how many seeds, where some are missing."""
    seeds = row.get("seeds", all_seeds)
    error = f" ± {row[name + '_se']:.2f}" if seeds > 1 else ""
    few = f" ({seeds} of {all_seeds})" if seeds < all_seeds else ""
    return f"{row[name]:.2f}{error}{few}"


def text_world(reward: str) -> str:
    """Oracle reward read off each method's frontier at each KL, and the highest that it reached."""
    done, out = read("frontier/results.json"), []
    rows = {(r["method"], r["kl"]): r for r in done["matched"] if r["reward"] == reward}
    budgets = sorted({kl for _, kl in rows})
    ends = {row["method"]: row for row in done["reach"] if row["reward"] == reward}
    all_seeds = done["settings"]["matrix"]["seeds"]
    for method in text_methods(done):
        cells = []
        for kl in budgets:
            row = rows.get((method, kl))
            cells.append(seeded(row, "oracle", all_seeds) if row else "–")
        end = ends.get(method)
        last = f"{seeded(end, 'oracle', all_seeds)} at {end['kl']:.1f}" if end else ""
        out.append([method, *cells, last])
    return markdown([reward, *(f"KL {kl:g}" for kl in budgets), "highest, at KL"], out)


def text_leads(reward: str) -> str:
    """EXO's lead over DPO in oracle reward at equal KL, paired over seeds: 95 % intervals."""
    done, out = read("frontier/results.json"), {}
    rows = [r for r in done["matched"] if r["reward"] == reward and "lead" in r]
    budgets = sorted({row["kl"] for row in rows})
    for row in rows:
        n = row["lead_seeds"]
        text = f"{row['lead']:+.2f} ± {T95[n] * row['lead_se']:.2f}" if n > 1 else "one seed"
        text += f" ({n} seeds)" if 1 < n < done["settings"]["matrix"]["seeds"] else ""
        out.setdefault(row["method"], {})[row["kl"]] = text
    table = [[name, *(found.get(kl, "–") for kl in budgets)] for name, found in out.items()]
    return markdown([f"{reward}: lead over its DPO", *(f"KL {kl:g}" for kl in budgets)], table)


def text_forms() -> str:
    """What policies write at each beta: share of well-formed texts and KL, mean over seeds; and the
    share of praise among them, seed by seed, where conviction pulls hardest."""
    done, out = read("frontier/results.json"), []
    matrix = done["settings"]["matrix"]
    where = {"n_embd": matrix["n_embd"]}
    finals = only(done["rows"], last=True, n_pairs=None, **where)
    places = [(reward, beta) for reward, betas in matrix["betas"] for beta in betas]
    last = matrix["betas"][-1][0]
    for method in ("sft", *matrix["methods"]):
        cells = []
        for reward, beta in places:
            own = only(done["start"], reward=reward, **where)
            if method != "sft":
                own = only(finals, reward=reward, beta=beta, method=method)
            shares, kls = ([row[k] for row in own] for k in ("producible", "kl"))
            kl = f" at {statistics.mean(kls):.2f}" if method != "sft" else ""
            cells.append(f"{100 * statistics.mean(shares):.0f} %{kl}")
        modes = ", ".join(f"{100 * row['praise']:.0f}" for row in own)
        out.append([method, *cells, modes])
    head = [f"{reward}, β {beta:g}" for reward, beta in places]
    return markdown(["well formed, at KL", *head, f"% praise, {last}, β {beta:g}, by seed"], out)


def text_calibration() -> str:
    """With the oracle, at small KL: shares of the optimum's gain over sft, and EXO's lead."""
    done, out = read("frontier/results.json"), []
    (exo, dpo), rows = CALIBRATION, done["calibration"]
    all_seeds = done["settings"]["matrix"]["seeds"]
    places = dict.fromkeys((row["reward"], row["n_embd"], row["kl"]) for row in rows)
    for place in sorted(places, key=lambda place: (place[0] != "sentiment", -place[1], place[2])):
        reward, width, kl = place
        own = only(rows, reward=reward, n_embd=width, kl=kl)
        if kl > CALIBRATED or len(own) < 2:
            continue
        few = f" ({len(own)} of {all_seeds} seeds)" if len(own) < all_seeds else ""
        shares = [spread([100 * row[m] / row["optimum"] for row in own], 0) for m in (exo, dpo)]
        lead = [row[exo] - row[dpo] for row in own]
        error = T95[len(own)] * statistics.stdev(lead) / len(own) ** 0.5
        cells = [f"{reward}, n_embd {width}{few}", f"{kl:g}"]
        cells += [spread([row["optimum"] for row in own], 2), *(f"{s} %" for s in shares)]
        out.append([*cells, f"{statistics.mean(lead):+.2f} ± {error:.2f}"])
    head = ["", "KL", "π\\* gains", f"share of {exo}", f"of {dpo}", "lead, 95 % interval"]
    return markdown(head, out)


def text_wins(reward: str, budget: float) -> str:
    """Win rates at one KL, by the oracle and by the reward model."""
    done, out = read("frontier/results.json"), []
    all_seeds = done["settings"]["matrix"]["seeds"]
    columns = ("win_oracle_sft", "win_rm_sft", "win_oracle_chosen", "win_rm_chosen")
    for row in done["matched"]:
        if (row["reward"], row["kl"]) == (reward, budget):
            cells = (seeded(row, c, all_seeds) if c in row else "–" for c in columns)
            out.append([row["method"], *cells])
    names = ("beats sft: oracle", "by model", "beats chosen: oracle", "by model")
    return markdown([f"{reward}, KL {budget:g}", *names], out)


TABLES = {
    "numbers": numbers,
    "paired": paired,
    "matched": matched,
    "bench": bench,
    "scaling": scaling,
    "text sentiment": functools.partial(text_world, "sentiment"),
    "text conviction": functools.partial(text_world, "conviction"),
    "leads sentiment": functools.partial(text_leads, "sentiment"),
    "leads conviction": functools.partial(text_leads, "conviction"),
    "forms": text_forms,
    "calibration": text_calibration,
    "wins": functools.partial(text_wins, "sentiment", 0.5),
}


def fill(text: str) -> str:
    """The README with every table between its markers replaced."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        assert start in text, f"README.md has no place for the table {name!r}"
        before, rest = text.split(start)
        text = before + start + make() + "\n" + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
