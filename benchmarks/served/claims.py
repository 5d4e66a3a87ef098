"""What benchmarks/serve.py claims: rows of --json, targets, and its last line."""

import sys

from kserve_utils.approve import MAX_DROP

CLIENTS = 8
TARGETS = {"fp32": 1.4, "bf16": 4.0}  # times TorchServe's images/s at eight clients


def claims_of(
    name: str, ours: dict, peer_name: str, peer: dict, equal: bool | None
) -> list:
    """Rows of --json for one engine; ratio: how many times better than TorchServe."""
    rows = []
    for clients in (CLIENTS, 1):
        for key, unit in (("rate", "images/s"), ("p50", "ms"), ("p99", "ms")):
            a, b = ours[clients][key], peer[clients][key]
            what = "images/s" if key == "rate" else key
            title = f"served {what}, {clients} client(s): {name} / {peer_name}"
            ratio = a / b if key == "rate" else b / a
            rows.append((title, unit, a, b, ratio))
    title = f"memory of the server: {name} / {peer_name}"
    rows.append((title, "MB", ours["MB"], peer["MB"], peer["MB"] / ours["MB"]))
    return [
        {
            "claim": title,
            "unit": unit,
            "ours": round(a, 3),
            "peer": round(b, 3),
            "ratio": round(ratio, 3),
            "equal": equal,
        }
        for title, unit, a, b, ratio in rows
    ]


def ap_claim(name: str, outcome: dict) -> dict:
    """The row of --json that says what a lower precision costs."""
    engine, precision = name.split()
    ours, peer = outcome[f"AP_{precision}"], outcome["AP_fp32"]
    row = {"claim": f"AP on {outcome['tiles']} tiles: {name} / {engine} fp32"}
    row |= {"unit": "AP", "ours": round(ours, 4), "peer": round(peer, 4)}
    return {**row, "ratio": round(ours / peer, 3), "equal": outcome["approved"]}


def verdict(differ: list[str], outcomes: dict) -> str:
    """The last line of the output; exits with it if something is not as it should be.

    Args:
        differ: fp32 servers whose boxes are not TorchServe's.
        outcomes: of `approve`.
    """
    if differ:
        sys.exit(f"the servers differ: {', '.join(differ)}, boxes against TorchServe")
    lines = ["fp32: the boxes of every engine are TorchServe's"]
    for (engine, precision), outcome in outcomes.items():
        name = f"{precision} of {engine}"
        if outcome is None:
            lines.append(f"{name}: its cost is not compared, the detector is untrained")
            continue
        figures = f"AP {outcome[f'AP_{precision}']:.4f}, fp32 {outcome['AP_fp32']:.4f}"
        if not outcome["approved"]:
            sys.exit(f"{name} costs more than {MAX_DROP} of AP: {figures}; not served")
        lines.append(f"{name}: {figures}, approved")
    return "; ".join(lines)


def show_claims(claims: list[dict]) -> None:
    print(f"\n{'claim':<68}{'ours':>9}{'peer':>9}{'ratio':>7}  equal")
    words = {True: "yes", False: "NO", None: "not compared"}
    for row in claims:
        digits = 4 if row["unit"] == "AP" else 2
        numbers = f"{row['ours']:>9.{digits}f}{row['peer']:>9.{digits}f}"
        numbers += f"{row['ratio']:>7.2f}"
        print(f"{row['claim']:<68}{numbers}  {words[row['equal']]}")


def show_targets(servers: list[str], best: dict, peer: str) -> None:
    """What the best engine of each precision reaches against its target."""
    for precision, target in TARGETS.items():
        of = [server for server in servers if server.endswith(precision)]
        if not of:
            print(f"{precision}: not served here")
            continue
        top = max(of, key=lambda server: best[server][CLIENTS]["rate"])
        ratio = best[top][CLIENTS]["rate"] / best[peer][CLIENTS]["rate"]
        lower = best[top][CLIENTS]["p50"] < best[peer][CLIENTS]["p50"]
        print(
            f"{precision}: {top} {ratio:.2f}x {peer} at {CLIENTS} clients, "
            f"{'lower' if lower else 'higher'} p50; target {target}x: "
            f"{'met' if ratio >= target and lower else 'missed'}"
        )
