"""
From the frontier's pieces to results.json, table.md and the figures.

A frontier is read at a given KL seed by seed (frontier_measure.at_kl), beginning at sft, KL 0,
which every method reaches with a large enough beta; never beyond its last point. A seed whose
frontier does not get there is left out, and a row says of how many seeds it is the mean.
"""

import itertools
import math
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from experiments import frontier_figures
from experiments.common import mean_se, only
from experiments.frontier import (
    BUDGETS,
    CALIBRATION,
    LEARNING_RATE,
    LEAST_ESS,
    SMALL_KL,
    Matrix,
    Piece,
    family,
    keys,
    load_piece,
)
from experiments.frontier_measure import at_kl
from infra.rows import write_json

QUANTITIES = {  # columns of the table
    "oracle": "oracle reward",
    "win_oracle_sft": "beats sft: oracle",
    "win_rm_sft": "beats sft: model",
    "win_oracle_chosen": "beats chosen: oracle",
    "win_rm_chosen": "beats chosen: model",
}


def collect(out: Path, matrix: Matrix, pieces: dict[str, Piece]) -> dict:
    """The finished pieces as flat lists of rows."""
    found = {"sft": [], "labels": [], "reward_models": [], "rows": []}
    found |= {"start": [], "optimum": [], "best_of_n": [], "density": [], "samples": []}
    key = keys(pieces)
    for name, piece in pieces.items():
        result, spec = load_piece(out, name, key[name]), piece.spec
        if result is None:  # --report of a run that is not finished
            continue
        who = {k: spec[k] for k in ("reward", "seed", "n_embd") if k in spec}
        if piece.make == "sft":
            found["sft"].append({**who, **result})
        elif piece.make == "labels":
            found["labels"].append({**who, **result})
        elif piece.make == "rm":
            result = {k: result[k] for k in ("accuracy", "correlation", "rm", "rm_stderr")}
            found["reward_models"].append({**who, "n_pairs": spec["n_pairs"], **result})
        elif piece.make == "limits":
            for kind in ("optimum", "best_of_n"):
                found[kind] += [{**who, **row} for row in result[kind]]
            found["start"].append({**who, **result["sft"]})
            if spec["seed"] == 0 and spec["n_embd"] == matrix.n_embd:
                mark = {**who, "method": "sft", "beta": None}
                found["samples"] += [{**mark, **sample} for sample in result["samples"]]
        else:
            who |= {k: spec[k] for k in ("method", "beta", "n_pairs", "K")}
            last = result["path"][-1]["step"]
            found["rows"] += [{**who, **row, "last": row["step"] == last} for row in result["path"]]
            betas = dict(matrix.betas)[spec["reward"]]
            if result.get("density") and spec["beta"] == betas[len(betas) // 2]:
                kl = result["path"][-1]["kl"]
                found["density"].append({**who, "kl": kl, **result["density"]})
            if spec["seed"] == 0 and spec["n_pairs"] is None and spec["n_embd"] == matrix.n_embd:
                found["samples"] += [{**who, **sample} for sample in result["samples"]]
    return found


# --------------------------------------------------------------------------------------------------
# Curves


def curve(done: dict, method: str, quantity: str = "oracle", **where) -> list[tuple[float, float]]:
    """One seed's frontier of a method: (KL, quantity), beginning at sft, of a trained one at sft's
    draws with the same random numbers. where: reward, seed, n_embd, and n_pairs (None: all)."""
    start = only(done["best_of_n"], n=1)
    place = {k: v for k, v in where.items() if k != "n_pairs"}
    if method == "optimum":
        rows = [r for r in only(done["optimum"], **place) if r["ess"] >= LEAST_ESS]
    elif method.startswith("best-of-n"):
        rows = only(done["best_of_n"], method=method, **place)
    else:
        where = {"n_pairs": None, **where}
        rows = only(done["rows"], method=method, last=True, **where)
        start = done["start"]
    points = [(row["kl"], row[quantity]) for row in rows if row.get(quantity) is not None]
    start = [(0.0, row[quantity]) for row in only(start, **place)[:1] if quantity in row]
    return sorted(start + points) if points else []


def matched(done: dict, method: str, quantity: str, kl: float, seeds, **where) -> dict[int, float]:
    """{seed: quantity at this KL}, only seeds whose frontier reaches it."""
    out = {}
    for seed in seeds:
        value = at_kl(curve(done, method, quantity, seed=seed, **where), kl)
        if not math.isnan(value):
            out[seed] = value
    return out


def compared(matrix: Matrix) -> tuple[str, ...]:
    return ("optimum", "best-of-n-oracle", "best-of-n", *matrix.methods)


def matched_rows(done: dict, matrix: Matrix) -> list[dict]:
    """Every method's quantities at each budget; for EXO also its lead over its DPO, by seeds."""
    seeds, out = range(matrix.seeds), []
    for (reward, _), kl, method in itertools.product(matrix.betas, BUDGETS, compared(matrix)):
        where, entry = {"reward": reward, "n_embd": matrix.n_embd}, {}
        for quantity in QUANTITIES:
            values = matched(done, method, quantity, kl, seeds, **where)
            if values:
                entry[quantity], entry[f"{quantity}_se"] = mean_se(list(values.values()))
                entry.setdefault("seeds", len(values))  # the oracle's, which comes first
        if not entry:
            continue
        if method.startswith("exo"):
            rival = "dpo" + method.removeprefix("exo")
            ours, theirs = (matched(done, m, "oracle", kl, seeds, **where) for m in (method, rival))
            leads = [ours[s] - theirs[s] for s in sorted(ours.keys() & theirs.keys())]
            if leads:
                entry["lead"], entry["lead_se"] = mean_se(leads)
                entry["lead_seeds"] = len(leads)
        out.append({"reward": reward, "kl": kl, "method": method, **entry})
    return out


def reach_rows(done: dict, matrix: Matrix) -> list[dict]:
    """The highest mean oracle reward of each method over its betas (or n), and its KL."""
    out = []
    for (reward, _), method in itertools.product(matrix.betas, compared(matrix)[1:]):
        best = method.startswith("best-of-n")
        rows = only(done["best_of_n" if best else "rows"], reward=reward, method=method)
        rows = only(rows, n_embd=matrix.n_embd)
        rows = rows if best else only(rows, last=True, n_pairs=None)
        ends = []
        for beta in {row["n" if best else "beta"] for row in rows}:
            own = only(rows, **{"n" if best else "beta": beta})
            mean, se = mean_se([row["oracle"] for row in own])
            ends.append({"oracle": mean, "oracle_se": se, "kl": mean_se([r["kl"] for r in own])[0]})
        if ends:
            top = max(ends, key=lambda end: end["oracle"])
            out.append({"reward": reward, "method": method, **top})
    return out


def efficiency_rows(done: dict, matrix: Matrix) -> list[dict]:
    """Oracle reward at each budget over the number of labelled pairs, seed by seed."""
    out = []
    labels = only(done["labels"], n_embd=matrix.n_embd)
    counts = {(row["reward"], row["seed"]): row["pairs"] for row in labels}
    places = itertools.product(matrix.betas, matrix.efficiency, (*matrix.pairs, None), BUDGETS)
    for (reward, _), method, n, kl in places:
        if reward not in matrix.efficiency_rewards or not matrix.pairs:
            continue
        where = {"reward": reward, "n_embd": matrix.n_embd, "n_pairs": n}
        values = matched(done, method, "oracle", kl, range(matrix.seeds), **where)
        for seed, value in values.items():
            row = {"reward": reward, "method": method, "pairs": n or counts[reward, seed]}
            out.append({**row, "kl": kl, "seed": seed, "oracle": value})
    return out


def calibration_rows(done: dict, matrix: Matrix) -> list[dict]:
    """What the optimum, EXO and DPO gain over sft in oracle reward at equal KL, the two with the
    oracle in their loss, for each width and seed."""
    out = []
    places = itertools.product(
        matrix.betas, (*matrix.widths, matrix.n_embd), (SMALL_KL, *BUDGETS), range(matrix.seeds)
    )
    for (reward, _), width, kl, seed in places:
        where, gain = {"reward": reward, "n_embd": width, "seed": seed}, {}
        for method in ("optimum", *CALIBRATION):
            points = curve(done, method, **where)
            gain[method] = at_kl(points, kl) - points[0][1] if points else math.nan
        if not any(map(math.isnan, gain.values())):
            out.append({**where, "kl": kl, **gain})
    return out


# --------------------------------------------------------------------------------------------------
# Telling


def cell(entry: dict, name: str, digits: int = 2) -> str:
    if name not in entry:
        return "–"
    return f"{entry[name]:.{digits}f} ± {entry[name + '_se']:.{digits}f}"


def table(done: dict, matrix: Matrix) -> str:
    """Markdown: a table per reward and budget."""
    lines = []
    for (reward, _), kl in itertools.product(matrix.betas, BUDGETS):
        entries = {e["method"]: e for e in only(done["matched"], reward=reward, kl=kl)}
        lines += [f"\n**{reward}, KL(π‖sft) = {kl:g}**\n"]
        lines += ["| | " + " | ".join(QUANTITIES.values()) + " | lead over DPO | seeds |"]
        lines += ["| --- |" + " ---: |" * (len(QUANTITIES) + 2)]
        for method in compared(matrix):
            entry = entries.get(method, {"seeds": 0})
            cells = [cell(entry, name) for name in QUANTITIES]
            lead = f"{entry['lead']:+.2f} ± {entry['lead_se']:.2f}" if "lead" in entry else ""
            cells += [lead, f"{entry['seeds']}"]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    note = (
        "Mean ± standard error over seeds (0 where there is one). Every number is read off a "
        "frontier over beta at this KL, interpolated in its square root; best-of-n at its bound. "
        "A dash: no seed's frontier gets there. The optimum and best-of-n begin at the mean of "
        "sft's pool, trained methods at sft's draws with the same random numbers as theirs.\n"
    )
    return note + "\n".join(lines) + "\n"


def marked(row: dict) -> str:
    """A sample on one line of Markdown, the completion in bold."""
    completion = " ".join(row["completion"].split()).replace("|", "\\|")
    return f"{row['prompt']} **{completion}**" if completion else f"{row['prompt']} *(nothing)*"


def text_samples(done: dict, matrix: Matrix) -> str:
    """Markdown: what policies write, good and bad, at a middle beta."""
    lines = []
    for reward, betas in matrix.betas:
        beta = betas[len(betas) // 2]
        lines.append(f"\n## {reward}, beta {beta:g}, seed 0\n")
        for method in ("sft", *matrix.methods):
            own = only(done["samples"], reward=reward, method=method)
            for row in (row for row in own if row["beta"] in (None, beta)):
                rates = f"oracle {row['oracle']:.2f}, model {row['rm']:.2f}"
                lines.append(f"- {method}, {row['which']} ({rates}): {marked(row)}")
    return "\n".join(lines) + "\n"


def tuning(out: Path, matrix: Matrix, pieces: dict[str, Piece]) -> dict:
    """What each method reaches at each learning rate: the share of what the optimum gains over sft
    in oracle reward - beta KL. (sft's mean is that of its pool, a little off for the policies'
    random numbers: the same for all rates.)"""
    found, rows, key = {}, [], keys(pieces)
    for name, piece in pieces.items():
        result, spec = load_piece(out, name, key[name]), piece.spec
        if result is None:
            continue
        where = {k: spec[k] for k in ("reward", "rate", "beta") if k in spec}
        if piece.make == "limits":
            found[spec["reward"]] = result
        elif piece.make == "policy" and spec["reward"] in found:
            limits, row, beta = found[spec["reward"]], result["path"][-1], spec["beta"]
            (best,) = only(limits["optimum"], beta=beta)
            start = limits["best_of_n"][0]["oracle"]
            gain, most = (x["oracle"] - beta * x["kl"] - start for x in (row, best))
            kept = {k: row[k] for k in ("oracle", "kl", "producible") if k in row}
            rows.append({"method": spec["method"], **where, "score": gain / most, **kept})
    chosen = {}
    for name in dict.fromkeys(family(row["method"]) for row in rows):
        own = [row for row in rows if family(row["method"]) == name]
        tried = dict.fromkeys(row["rate"] for row in sorted(own, key=lambda row: row["rate"]))
        count = {rate: len(only(own, rate=rate)) for rate in tried}
        whole = [rate for rate in tried if count[rate] == max(count.values())]
        score = {r: mean_se([x["score"] for x in only(own, rate=r)])[0] for r in whole}
        chosen[name] = max(score, key=score.get)
        print(f"{name:10}", *(f"{r:g}: {x:+.3f} " for r, x in score.items()), chosen[name])
    done = {"settings": asdict(matrix), "rows": rows, "chosen": chosen}
    write_json(out / "tuning.json", done)
    return done


def report(out: Path, matrix: Matrix, pieces: dict[str, Piece]) -> dict:
    done = collect(out, matrix, pieces)
    done["matched"] = matched_rows(done, matrix)
    done["reach"] = reach_rows(done, matrix)
    done["efficiency"] = efficiency_rows(done, matrix)
    done["calibration"] = calibration_rows(done, matrix)
    settings = {"matrix": asdict(matrix), "learning_rate": LEARNING_RATE, "least_ess": LEAST_ESS}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    done = {"settings": settings, "versions": versions, **done}
    write_json(out / "results.json", done)
    (out / "table.md").write_text(table(done, matrix), encoding="utf-8")
    (out / "samples.md").write_text(text_samples(done, matrix), encoding="utf-8")
    print(table(done, matrix))
    frontier_figures.draw_all(done, matrix, out)
    print(f"Written to {out}")
    return done
