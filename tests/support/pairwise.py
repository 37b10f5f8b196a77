"""A small set of rows in which every two values of every two columns meet."""

import random
from itertools import combinations, islice, product


def covering_rows(columns, allowed=lambda row: True, seed=0, tries=40):
    """Rows {column: value} that cover all pairs which some allowed row holds; greedy, seeded, so always the same.

    columns: {name: list of values}. allowed: of a full row. A pair that is in no allowed row of many is left out;
    `uncovered` lists those of a set of rows.
    """
    draw, rows, missing = random.Random(seed), [], dict.fromkeys(all_pairs(columns))
    while missing:
        a, x, b, y = next(iter(missing))
        drawn = ({n: draw.choice(values) for n, values in columns.items()} | {a: x, b: y} for _ in range(20 * tries))
        found = list(islice(filter(allowed, drawn), tries))
        if found:
            rows.append(max(found, key=lambda row: len(pairs(row) & missing.keys())))
        for pair in pairs(rows[-1]) if found else [(a, x, b, y)]:
            missing.pop(pair, None)
    return rows


def covering_some(rows):
    """Which rows, a few of them, hold every value that any holds; greedy."""
    held = [set(row.items()) for row in rows]
    missing, chosen = set().union(*held), []
    while missing:
        chosen.append(max(range(len(rows)), key=lambda i: len(held[i] & missing)))
        missing -= held[chosen[-1]]
    return chosen


def uncovered(rows, columns):
    """Pairs of values that meet in no row."""
    met = set().union(*map(pairs, rows))
    return [pair for pair in all_pairs(columns) if pair not in met]


def all_pairs(columns):
    return [(a, x, b, y) for a, b in combinations(columns, 2) for x, y in product(columns[a], columns[b])]


def pairs(row):
    return {(a, row[a], b, row[b]) for a, b in combinations(row, 2)}
