"""Fills docs/performance.md and draws its charts from what `lorad bench --json` has written.

    plot_bench.py BENCH.json...            e.g. build/bench.json

Several files are parts of one measurement: one machine, one lorad, the same --quick and --precision.  Of a
row that two have, the later is taken, unless it is open.  Tables go between the two marker lines of
docs/performance.md, charts to docs/img (they need matplotlib: Debian's python3-matplotlib; without it only
the tables are written).
"""
import json
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGE = os.path.join(ROOT, "docs", "performance.md")
IMAGES = os.path.join(ROOT, "docs", "img")
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
PRECISIONS = ("fast", "exact")
drawn = []  # names of charts


# --- reading ---------------------------------------------------------------------------------------
def read(paths):
    """{id: row}, machine, date of the last; leaves with a sentence if the files do not belong together."""
    rows, first, machine, date = {}, None, None, None
    for path in paths:
        try:
            with open(path) as f:
                j = json.load(f)
            if j["format"] != 1:
                sys.exit(f"{path}: format {j['format']} is not known here")
            same = {k: j["machine"][k] for k in ("lorad", "cpu", "cpus", "threads", "kernels")}
            same.update({k: j[k] for k in ("quick", "precision")})
        except (OSError, ValueError, KeyError, TypeError) as e:
            sys.exit(f"{path}: this is not what lorad bench --json writes ({e})")
        first = first or same
        differ = [f"{k} ({first[k]} and {same[k]})" for k in same if same[k] != first[k]]
        if differ:
            sys.exit(f"{path}: it does not belong to {paths[0]}: they differ in {', '.join(differ)}")
        machine, date = j["machine"], j["date"]
        for row in j["rows"]:
            # Of two that are open, the one of a run that tried knows more.
            old = rows.get(row["id"])
            if row["verdict"] != "open" or old is None or "not asked for" in old.get("why", ""):
                rows[row["id"]] = row
    return rows, machine, date


def value(rows, name):
    row = rows.get(name)
    return row["value"] if row and row["verdict"] != "open" else None


def ratio(rows, name):
    row = rows.get(name)
    return row.get("ratio") if row and row["verdict"] != "open" else None


def numbers(rows, pattern):
    """The numbers that stand for the group of `pattern` in the ids of measured rows, ascending."""
    found = (re.fullmatch(pattern, k) for k, v in rows.items() if v["verdict"] != "open")
    return sorted({int(m.group(1)) for m in found if m})


def shapes(rows, part):
    """Shapes that a part has rows of, the smallest first."""
    found = (re.match(rf"{part}\.(\d+(?:\.\d+)?[mb])\.", k) for k, v in rows.items() if v["verdict"] != "open")
    size = {"m": 1, "b": 1000}
    return sorted({m.group(1) for m in found if m}, key=lambda s: float(s[:-1]) * size[s[-1]])


def chart(name, what):
    return [f"![{what}](img/{name}.svg)", ""] if name in drawn else []


# --- tables ----------------------------------------------------------------------------------------
def short(x):
    if x is None:
        return ""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.3g}"


def percent(x):
    return "" if x is None else f"{100 * x:.0f} %"


def table(head, lines):
    lines = [line for line in lines if any(line[1:])]
    if not lines:
        return []
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head),
            *("| " + " | ".join(line) + " |" for line in lines), ""]


def targets(rows):
    lines = []
    for name, row in rows.items():
        if "target" not in row:
            continue
        x = row.get("ratio") if row["of_ratio"] else row.get("value")
        mark = {"met": "met", "MISSED": "**missed**", "open": row.get("why", "open")}[row["verdict"]]
        noise = f" (others took {percent(row['foreign'])} of the CPU time)" if row.get("foreign", 0) > 0.05 else ""
        lines.append([f"`{name}`", row["what"], ("<= " if row["at_most"] else ">= ") + short(row["target"]),
                      short(x) or "-", mark + noise])
    return ["### What lorad is held to", "",
            *table(["row", "what", "target", "measured", "verdict"], lines)]


def by_shape(rows, part, title, first, letter, sizes):
    """Tokens per second: a line per size, a column per shape and precision."""
    columns = [(s, p) for s in shapes(rows, part) for p in PRECISIONS]
    head = [first] + [f"{s} `{p}`" for s, p in columns]
    lines = [[str(n)] + [short(value(rows, f"{part}.{s}.{p}.{letter}{n}")) for s, p in columns] for n in sizes]
    if part == "decode":
        lines.append(["batch 1, share of reading"] +
                     [percent(ratio(rows, f"decode.{s}.{p}.b1.read")) for s, p in columns])
    body = table(head, lines)
    return [f"### {title}", "", *body, *chart(part, title)] if body else []


def mixed(rows):
    out = []
    for s in shapes(rows, "mixed"):
        columns = [(p, r) for p in PRECISIONS for r in numbers(rows, rf"mixed\.{re.escape(s)}\.{p}\.r(\d+)\.a0")]
        lines = []
        for a in numbers(rows, rf"mixed\.{re.escape(s)}\.\w+\.r\d+\.a(\d+)"):
            names = [f"mixed.{s}.{p}.r{r}.a{a}" for p, r in columns]
            lines.append([f"{a} adapter{'s' * (a > 1)}" if a else "none: tokens/s"] +
                         [percent(ratio(rows, n)) if a else short(value(rows, n)) for n in names])
        body = table([f"{s}, 16 rows"] + [f"`{p}` rank {r}" for p, r in columns], lines)
        out += body
    return ["### Batches of many adapters", "", *out, *chart("mixed", "tokens/s with adapters")] if out else []


def kernels(rows):
    lines = []
    for k in ("nf4", "head"):
        for p in PRECISIONS:
            for m in numbers(rows, rf"kernels\.{k}\.{p}\.m(\d+)"):
                name = f"kernels.{k}.{p}.m{m}"
                lines.append([f"{'4-bit' if k == 'nf4' else '8-bit head'} `{p}`, {m} row{'s' * (m > 1)}", short(value(rows, name)),
                              percent(ratio(rows, name + ".read")), percent(ratio(rows, name + ".peak")),
                              short(ratio(rows, name))])
    for name, row in rows.items():
        m = re.fullmatch(r"kernels\.dx\.(\w+)\.(\d+)x(\d+)", name)
        if m and row["verdict"] != "open":
            lines.append([f"backward `{m.group(1)}`, 512 rows, {m.group(2)} x {m.group(3)}", short(row["value"]), "", "",
                          short(row["ratio"])])
    body = table(["matrix product", "GOP/s", "of reading", "of the instruction's peak", "times OpenBLAS fp32"], lines)
    return ["### Kernels", "", *body, *chart("kernels", "kernels beside their bounds")] if body else []


def rest(rows):
    """Every other row, as it is."""
    shown = ("decode", "prompt", "mixed", "kernels")
    lines = []
    for name, row in rows.items():
        if row["verdict"] == "open" or row["part"] in shown:
            continue
        ref = row.get("reference")
        lines.append([f"`{name}`", f"{short(row['value'])} {row['unit']}",
                      f"{short(ref['value'])} {ref['name']}" if ref else "", short(row.get("ratio"))])
    body = table(["row", "value", "reference", "ratio"], lines)
    return ["### Everything else", "", *chart("http", "clients of a server"), *chart("rotation", "adapters in rotation"),
            *body] if body else []


def page(rows, machine, date):
    gib = machine["memory"] / 2 ** 30
    noisy = [k for k, v in rows.items() if v.get("foreign", 0) > 0.05]
    text = [f"Measured {date[:10]} with lorad {machine['lorad']} on {machine['cpu']}, {machine['threads']} threads of "
            f"{machine['cpus']} CPUs, `{machine['kernels']}` kernels, {gib:.0f} GiB of memory, huge pages "
            f"`{machine['huge_pages']}`, {machine['compiler']}, OpenBLAS {machine['openblas']}.", ""]
    if noisy:
        text += [f"While {len(noisy)} of {len(rows)} rows were measured, others took more than 5 % of the CPU time.", ""]
    text += targets(rows)
    text += kernels(rows)
    text += by_shape(rows, "decode", "Decoding, tokens/s in all", "sequences", "b",
                     numbers(rows, r"decode\..*\.b(\d+)"))
    text += by_shape(rows, "prompt", "Prompts, tokens/s", "tokens", "t", numbers(rows, r"prompt\..*\.t(\d+)"))
    text += mixed(rows)
    text += rest(rows)
    return "\n".join(text).rstrip() + "\n"


def fill(text):
    with open(PAGE) as f:
        old = f.read()
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(END) < old.index(BEGIN):
        sys.exit(f"{PAGE} lacks the lines {BEGIN} and {END}")
    with open(PAGE, "w") as f:
        f.write(old[:old.index(BEGIN)] + BEGIN + "\n\n" + text + "\n" + old[old.index(END):])


# --- charts ----------------------------------------------------------------------------------------
def lines_chart(plt, name, title, x_label, y_label, series, reference=None, log_y=False):
    """series: {label: [(x, y)]}; x is spaced by powers of two."""
    from matplotlib import ticker
    series = {k: [(x, y) for x, y in v if y is not None] for k, v in series.items()}
    series = {k: v for k, v in series.items() if len(v) > 1}
    if not series:
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    kinds = []  # what differs in precision only has one colour
    for label, points in series.items():
        kind = re.sub(r"\b(fast|exact)\b", "", label)
        kinds += [kind] * (kind not in kinds)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, linewidth=1.2,
                  linestyle="--" if "exact" in label else "-", color=f"C{kinds.index(kind)}", label=label)
    if reference:
        axes.axhline(reference[1], color="gray", linewidth=0.8, linestyle=":", label=reference[0])
    ticks = sorted({x for v in series.values() for x, _ in v})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(fontsize=7, ncols=2)
    save(plt, figure, name)


def save(plt, figure, name):
    figure.tight_layout()
    figure.savefig(os.path.join(IMAGES, name + ".svg"), metadata={"Date": None})
    plt.close(figure)
    drawn.append(name)


def draw_kernels(plt, rows):
    series, top = {}, []
    for p in PRECISIONS:
        sizes = numbers(rows, rf"kernels\.nf4\.{p}\.m(\d+)")
        series[f"4-bit {p}"] = [(m, value(rows, f"kernels.nf4.{p}.m{m}")) for m in sizes]
        peaks = [rows.get(f"kernels.nf4.{p}.m{m}.peak") for m in sizes]
        series[f"the instruction, {p}"] = [(m, r["reference"]["value"]) for m, r in zip(sizes, peaks)
                                           if r and r["verdict"] != "open"]
        top = top or [(m, rows[f"kernels.nf4.{p}.m{m}"]["reference"]["value"]) for m in sizes]
    series["OpenBLAS fp32"] = top
    lines_chart(plt, "kernels", "One linear layer of 5632 x 2048", "rows", "GOP/s", series, log_y=True)


def draw_decode(plt, rows):
    lines_chart(plt, "decode", "Decoding without adapters", "sequences", "tokens/s in all",
                {f"{s} {p}": [(n, value(rows, f"decode.{s}.{p}.b{n}"))
                              for n in numbers(rows, rf"decode\.{re.escape(s)}\.{p}\.b(\d+)")]
                 for s in shapes(rows, "decode") for p in PRECISIONS}, log_y=True)


def draw_mixed(plt, rows):
    s = "1.1b" if "1.1b" in shapes(rows, "mixed") else (shapes(rows, "mixed") or [""])[0]
    name = rf"mixed\.{re.escape(s)}"
    series = {}
    for p in PRECISIONS:
        for r in numbers(rows, rf"{name}\.{p}\.r(\d+)\.a0"):
            counts = [a for a in numbers(rows, rf"{name}\.{p}\.r{r}\.a(\d+)") if a > 0]
            series[f"{p}, rank {r}"] = [(a, 100 * ratio(rows, f"mixed.{s}.{p}.r{r}.a{a}")) for a in counts]
    lines_chart(plt, "mixed", f"16 rows, {s}: tokens/s with adapters", "different adapters",
                "% of the batch without", series, ("target, rank 16", 85))


def draw_rotation(plt, rows):
    lines_chart(plt, "rotation", "Adapters in rotation", "adapters", "requests/s",
                {mix: [(n, value(rows, f"rotation.{mix}.a{n}")) for n in numbers(rows, rf"rotation\.{mix}\.a(\d+)")]
                 for mix in ("distinct", "uniform", "skewed", "identical")})


def draw_http(plt, rows):
    """Bars: no adapter, one shared, one each."""
    kinds = {"no adapter": ".none", "one for all": ".shared", "one each": ""}
    groups = [(s, n) for s in shapes(rows, "http") for n in numbers(rows, rf"http\.{re.escape(s)}\.c(\d+)")]
    if not groups:
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    for i, (label, suffix) in enumerate(kinds.items()):
        heights = [value(rows, f"http.{s}.c{n}{suffix}") or 0 for s, n in groups]
        axes.bar([g + 0.27 * (i - 1) for g in range(len(groups))], heights, 0.25, label=label)
    axes.set_xticks(range(len(groups)), [f"{s}\n{n} clients" if n > 1 else f"{s}\n1 client" for s, n in groups])
    axes.set(ylabel="tokens/s in all", title="Streaming clients of a server")
    axes.grid(axis="y", alpha=0.3, linewidth=0.5)
    axes.legend(fontsize=8)
    save(plt, figure, "http")


def draw(rows):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not there (python3-matplotlib): no charts", file=sys.stderr)
        return
    matplotlib.use("svg")
    # Text stays text, and the same numbers give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lorad", "font.size": 9})
    import matplotlib.pyplot as plt
    os.makedirs(IMAGES, exist_ok=True)
    for chart in (draw_kernels, draw_decode, draw_mixed, draw_rotation, draw_http):
        chart(plt, rows)


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    rows, machine, date = read(sys.argv[1:])
    draw(rows)
    fill(page(rows, machine, date))


main()
