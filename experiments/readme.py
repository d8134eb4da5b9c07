"""
The README's tables, made from the result files in assets/, so that they cannot drift.

    python -m experiments.readme        writes them between the pages' markers

tests/test_readme.py fails while the two disagree.
"""

import functools
import json
import re
import statistics
from pathlib import Path

import torch

from exo import dpo_loss, exo_loss, preference_target
from experiments.common import distinct, mean_se, only
from experiments.text.constants import CALIBRATION

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


# --------------------------------------------------------------------------------------------------
# The exact world

EXACT_COLUMNS = {
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
RIVALS = [(f"exo-{kind}", f"dpo-{kind}", K) for kind in ("rw", "online") for K in (2, 8, 64)]
RIVALS += [(f"exo-{kind}", f"dpo-{kind}", 2) for kind in ("pref", "online-pref")]
RIVALS += [("exo-pref-1e-3", "dpo-pref", 2), ("reverse-kl-descent", "forward-kl-descent", None)]


def named(method: str, K: int | None) -> str:
    return f"{method}, K = {K}" if K else method


def by_seed(rows: list[dict], name: str, **where) -> dict[int, float]:
    return {row["seed"]: row[name] for row in only(rows, **where)}


def leads(rows: list[dict], name: str, ours: dict, theirs: dict) -> list[float]:
    """Differences over the seeds that both have, so that what worlds share cancels."""
    a, b = by_seed(rows, name, **ours), by_seed(rows, name, **theirs)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def pm(values: list[float], sign: str = "", digits: int = 2) -> str:
    mean, error = mean_se(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")


def exact() -> str:
    """Every method of the default run, mean ± standard error over seeds."""
    rows, out = read("toy/results.json")["rows"], []
    for method, K in distinct(rows, "method", "K"):
        own = only(rows, method=method, K=K)
        out.append([named(method, K), *(pm([r[c] for r in own]) for c in EXACT_COLUMNS)])
    return markdown(["", *EXACT_COLUMNS.values()], out)


def paired() -> str:
    """The differences that the table of all methods cannot show: seeds differ more than methods."""
    rows, out = read("toy/results.json")["rows"], []
    pairs = [((b, K), (a, K)) for a, b, K in RIVALS]
    pairs += [(("rloo", K), ("exo-online", K)) for K in (2, 8, 64)]
    pairs += [(("exo-rw", 64), ("reverse-kl-descent", None))]
    pairs += [(("dpo-rw", 64), ("forward-kl-descent", None))]
    pairs += [(("forward-kl", None), ("reverse-kl", None))]
    columns = ("reverse_kl", "forward_kl", "reward", "on", "modes")
    for a, b in pairs:
        where = [{"method": method, "K": K} for method, K in (a, b)]
        cells = (pm(leads(rows, name, *where), "+") for name in columns)
        out.append([f"{named(*a)} minus {named(*b)}", *cells])
    return markdown(["", *(EXACT_COLUMNS[c] for c in columns)], out)


def matched() -> str:
    """E[r] of measured policies at equal KL(pi || sft), over the seeds that got there."""
    done, out = read("toy/sweep.json"), []
    seeds, targets = done["config"]["seeds"], sorted(distinct(done["matched"], "target"))
    for method, K in distinct(done["frontier"], "method", "K"):
        cells = []
        for target in targets if method != "pi-star" else ():
            values = [r["reward"] for r in only(done["matched"], method=method, K=K, target=target)]
            few = f" ({len(values)})" if len(values) < seeds else ""
            cells.append(pm(values) + few if values else "–")
        if cells:
            out.append([named(method, K), *cells])
    return markdown(["E[r]", *(f"KL {t:g}" for t in targets)], out)


def matched_lead(rows: list[dict], target: float, exo: str, dpo: str, K: int | None) -> list[float]:
    where = ({"method": m, "K": K, "target": target} for m in (exo, dpo))
    return leads(rows, "reward", *where)


def matched_leads() -> str:
    """EXO's lead over DPO there, paired over the seeds where both got there."""
    done, out = read("toy/sweep.json"), []
    targets = sorted(distinct(done["matched"], "target"))
    for exo, dpo, K in RIVALS:
        found = (matched_lead(done["matched"], target, exo, dpo, K) for target in targets)
        cells = (f"{pm(values, '+')} ({len(values)})" if values else "–" for values in found)
        out.append([f"{named(exo, K)}, over {dpo}", *cells])
    return markdown(["lead in E[r]", *(f"KL {t:g}" for t in targets)], out)


CAPTION = r"""
*A completion is two tokens of 32, so a policy is an image (row: first token, column: second). The
reward likes six bumps, and the optimum π\* has its mass there. The policy, a tiny GPT, can hardly
tell the second token which bump the first one chose. With K = 64 completions to compare EXO gives
bumps up and puts nearly nothing elsewhere; DPO keeps more bumps, and pays with the crossings of
their rows and columns. Below each: the share of its mass that is on a bump, and its mean reward
E\[r\]. The completions are drawn by `sft`, where training starts, or by the policy itself; with two
own draws DPO commits, too. "Exact gradient": K without end. "Best fit known": the lowest KL that
any start has led to. This is seed 0, not chosen, and DPO's worst: {seed 0|on|dpo-rw|64} on bumps at
K = 64, where eight seeds have {on|dpo-rw|64}.*
"""

FOUND = r"""
- **EXO commits, DPO spreads, once K is large.** At K = 64 EXO has {on|exo-rw|64} of its mass on
  bumps and holds {modes|exo-rw|64} of six. DPO has {on|dpo-rw|64} and holds {modes|dpo-rw|64}, with
  {between|dpo-rw|64} on crossings. EXO's lead in J, whose optimum is {J|pi-star|}, is
  {lead in J|64} at K = 64, {lead in J|8} at 8 and {lead in J|2} at 2.
- **Each ends about as low as the exact gradient of its KL does**, from the same start in as many
  steps: reverse KL {reverse_kl|exo-rw|64} for EXO, {reverse_kl|reverse-kl-descent|} exactly;
  forward KL {forward_kl|dpo-rw|64} for DPO, {forward_kl|forward-kl-descent|} exactly.
- **Neither is an optimum.** From many starts, with patience, the reverse KL falls to
  {reverse_kl|reverse-kl|} ({modes|reverse-kl|} bumps, {on|reverse-kl|} on them), the forward KL to
  {forward_kl|forward-kl|} ({modes|forward-kl|} bumps, {on|forward-kl|}). The directions still
  differ, but most of what EXO drops and DPO spreads is lost on the way: that forward fit has
  a lower reverse KL, {reverse_kl|forward-kl|}, than EXO has.
- **EXO leads at equal distance from `sft`**, with many rewards: in E\[r\], at K = 64, by
  {lead|0.5|exo-rw|dpo-rw|64} at KL(π‖sft) = 0.5, {lead|1|exo-rw|dpo-rw|64} at 1,
  {lead|1.5|exo-rw|dpo-rw|64} at 1.5 and {lead|2.5|exo-rw|dpo-rw|64} at 2.5, over the seeds in which
  both get there.
- **With labelled pairs EXO does not win.** Given one target, both losses pull a pair the same way.
  At equal β DPO has the lower reverse KL, {reverse_kl|dpo-pref|2} against {reverse_kl|exo-pref|2}
  (ε = 0.119, which matches the temperatures; at the paper's 0.001 {reverse_kl|exo-pref-1e-3|2}).
  At equal distance EXO's lead is {lead|0.5|exo-pref|dpo-pref|2} at 0.5 and
  {lead|1|exo-pref|dpo-pref|2} at 1.
- **Who draws matters as much as the direction.** On the policy's own draws EXO is a policy
  gradient, (K − 1)/K times RLOO's, and hardly needs K: reverse KL {reverse_kl|exo-online|2} at
  K = 2, {reverse_kl|exo-online|64} at 64. DPO pulls two own draws as EXO does, times a positive
  factor, and commits, too ({on|dpo-online|2} on bumps); with 64 it spreads
  ({on|dpo-online|64}). In between, at K = 8, it has the lowest mean reverse KL of all that learn
  from draws, {reverse_kl|dpo-online|8}.
- **Mode-seeking has a price.** Where the policy can hold π\* (n_embd 8 instead of 3) DPO reaches
  it, reverse KL {wide|reverse_kl|dpo-rw|8}; EXO stays with the {wide|modes|exo-rw|8} bumps it chose
  first, {wide|reverse_kl|exo-rw|8}.
- **EXO needs K, more the further it has come.** Its expected gradient's cosine with that of J is
  {pull|half-way|exo-rw|2} half-way at K = 2 and {pull|half-way|exo-rw|32} at 32, near the end
  {pull|near its end|exo-rw|32} at 32 and {pull|near its end|exo-rw|256} at 256. DPO's is
  {pull|half-way|dpo-rw|256} and {pull|near its end|dpo-rw|256}, at any K.
"""


def told(text: str) -> str:
    """A text with each {field} from the committed files. What its sentences say in words,
    tests/test_readme.py asserts."""
    rows, done = read("toy/results.json")["rows"], read("toy/sweep.json")

    def percent(values: list[float]) -> str:
        return pm([100 * x for x in values], digits=0) + " %"

    def field(match: re.Match) -> str:
        kind, *names = match[1].split("|")
        if kind == "seed 0":
            column, method, K = names
            return percent([row[column] for row in only(rows, method=method, K=int(K), seed=0)])
        if kind == "lead in J":
            where = ({"method": m, "K": int(names[0])} for m in ("exo-rw", "dpo-rw"))
            return pm(leads(rows, "J", *where), "+")
        if kind == "lead":
            target, exo, dpo, K = names
            values = matched_lead(done["matched"], float(target), exo, dpo, int(K))
            return f"{pm(values, '+')} ({len(values)} seeds)"
        if kind == "wide":
            column, method, width = names
            own = only(done["capacity"], method=method, K=64, n_embd=int(width))
            return pm([row[column] for row in own], digits=1 if column == "modes" else 2)
        if kind == "pull":
            place, method, K = names
            own = only(done["directions"], place=place, method=method, K=int(K))
            return pm([row["to_J"] for row in own])
        method, K = names
        values = [row[kind] for row in only(rows, method=method, K=int(K) if K else None)]
        if kind in ("on", "between"):
            return percent(values)
        return pm(values, digits=1 if kind == "modes" else 2)

    return re.sub(r"\{([^}]+)\}", field, text.strip())


def pull() -> str:
    """What EXO's vanishing gradient costs, by the losses themselves."""
    slopes = {}
    for name, loss, eps in (("EXO", exo_loss, 1e-3), ("DPO", dpo_loss, 0.0)):
        margin = torch.tensor(-8.0, dtype=torch.float64, requires_grad=True)
        pair = torch.stack([margin, torch.zeros_like(margin)])[None]
        (slope,) = torch.autograd.grad(
            loss(pair, torch.zeros_like(pair), preference_target(eps)), margin
        )
        slopes[name] = abs(slope.item())
    return (
        "*Where a pair is undecided EXO pulls harder. But one on which the policy is confidently\n"
        "wrong, by a margin of −8, pulls with "
        f"{slopes['DPO']:.2f} under DPO and with {slopes['EXO']:.3f} under\n"
        "EXO at ε = 0.001: EXO hardly learns from what it has ruled out.*"
    )


def directions() -> str:
    rows, out = read("toy/sweep.json")["directions"], []
    sizes = (2, 8, 32, 128)
    for place in distinct(rows, "place"):
        here = only(rows, place=place)
        cells = [pm([r[c] for r in only(here, K=2, method="exo-rw")]) for c in ("forward_to_J",)]
        for method in ("exo-rw", "dpo-rw"):
            cells += (pm([r["to_J"] for r in only(here, method=method, K=K)]) for K in sizes)
        out.append([f"{place}, KL(π‖π*) {mean_se([r['reverse_kl'] for r in here])[0]:.1f}", *cells])
    head = [f"{name}, K = {K}" for name in ("EXO", "DPO") for K in sizes]
    return markdown(["cosine with the gradient of J", "forward KL", *head], out)


def capacity() -> str:
    rows, out = read("toy/sweep.json")["capacity"], []
    shown = {"exo-rw": 64, "dpo-rw": 64, "reverse-kl": None, "forward-kl": None}
    for width in distinct(rows, "n_embd"):
        own = [only(rows, n_embd=width, method=m, K=K) for m, K in shown.items()]
        cells = [pm([r["reverse_kl"] for r in x]) for x in own]
        out.append([str(width), *cells, *(pm([r["modes"] for r in x], digits=1) for x in own)])
    head = [f"{what}: {m}" for what in ("KL(π‖π*)", "bumps") for m in shown]
    return markdown(["n_embd", *head], out)


def efficiency() -> str:
    rows, out = read("toy/sweep.json")["efficiency"], []
    budgets = sorted(distinct(rows, "completions"))
    for method in distinct(rows, "method"):
        cells = []
        for budget in budgets:
            own = only(rows, method=method, completions=budget)
            cells.append(f"{pm([r['regret'] for r in own])} (K {own[0]['K']})")
        out.append([method, *cells])
    return markdown(["regret", *(f"{b:,} completions" for b in budgets)], out)


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
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
# of Student's t, by the number of seeds


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
    done, out = read("text/results.json"), []
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
    done, out = read("text/results.json"), {}
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
    done, out = read("text/results.json"), []
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
    done, out = read("text/results.json"), []
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
    done, out = read("text/results.json"), []
    all_seeds = done["settings"]["matrix"]["seeds"]
    columns = ("win_oracle_sft", "win_rm_sft", "win_oracle_chosen", "win_rm_chosen")
    for row in done["matched"]:
        if (row["reward"], row["kl"]) == (reward, budget):
            cells = (seeded(row, c, all_seeds) if c in row else "–" for c in columns)
            out.append([row["method"], *cells])
    names = ("beats sft: oracle", "by model", "beats chosen: oracle", "by model")
    return markdown([f"{reward}, KL {budget:g}", *names], out)


TABLES = {
    "README.md": {
        "caption": functools.partial(told, CAPTION),
        "found": functools.partial(told, FOUND),
        "pull": pull,
    },
    "experiments/README.md": {
        "exact": exact,
        "paired": paired,
        "matched": matched,
        "matched leads": matched_leads,
        "directions": directions,
        "capacity": capacity,
        "efficiency": efficiency,
        "bench": bench,
        "scaling": scaling,
        "text sentiment": functools.partial(text_world, "sentiment"),
        "text conviction": functools.partial(text_world, "conviction"),
        "leads sentiment": functools.partial(text_leads, "sentiment"),
        "leads conviction": functools.partial(text_leads, "conviction"),
        "forms": text_forms,
        "calibration": text_calibration,
        "wins": functools.partial(text_wins, "sentiment", 0.5),
    },
}


def fill(page: str) -> str:
    """A page with every table between its markers replaced."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, make in TABLES[page].items():
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        assert start in text, f"{page} has no place for the table {name!r}"
        before, rest = text.split(start)
        text = before + start + make() + "\n" + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    for page in TABLES:
        (ROOT / page).write_text(fill(page), encoding="utf-8")
