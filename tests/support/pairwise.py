"""A small set of rows in which every two values of every two columns meet."""

import itertools
import random


def covering_rows(columns, allowed=lambda row: True, seed=0, tries=200):
    """Rows {column: value} that cover all pairs which some allowed row holds; greedy, seeded, so always the same.

    columns: {name: list of values}. allowed: of a full row. A pair that no allowed row could hold in many tries is
    left out; `uncovered` lists those of a set of rows.
    """
    draw = random.Random(seed)
    names = list(columns)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(columns[a])), range(len(columns[b])))
    }
    rows, skipped = [], set()
    while missing - skipped:
        target = min(missing - skipped)
        best, gain = None, 0
        for _ in range(tries):
            pick = {n: draw.randrange(len(columns[n])) for n in names}
            pick[target[0]], pick[target[2]] = target[1], target[3]
            for _ in range(len(names)):  # repair towards an allowed row without losing the target
                if allowed({n: columns[n][i] for n, i in pick.items()}):
                    break
                n = draw.choice([n for n in names if n not in (target[0], target[2])])
                pick[n] = draw.randrange(len(columns[n]))
            else:
                continue
            won = len(_pairs(pick, names) & missing)
            if won > gain:
                best, gain = pick, won
        if best is None:
            skipped.add(target)
            continue
        missing -= _pairs(best, names)
        rows.append({n: columns[n][i] for n, i in best.items()})
    return rows


def _pairs(pick, names):
    return {(a, pick[a], b, pick[b]) for a, b in itertools.combinations(names, 2)}


def covering_some(rows):
    """Which rows, a few of them, hold all pairs that any holds; greedy."""
    pairs = [{(a, row[a], b, row[b]) for a, b in itertools.combinations(row, 2)} for row in rows]
    missing, chosen = set().union(*pairs), []
    while missing:
        chosen.append(max(range(len(rows)), key=lambda i: len(pairs[i] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


def uncovered(rows, columns):
    """Pairs of values that meet in no row."""
    met = {(a, repr(row[a]), b, repr(row[b])) for row in rows for a, b in itertools.combinations(columns, 2)}
    return [
        (a, x, b, y)
        for a, b in itertools.combinations(columns, 2)
        for x, y in itertools.product(columns[a], columns[b])
        if (a, repr(x), b, repr(y)) not in met
    ]
