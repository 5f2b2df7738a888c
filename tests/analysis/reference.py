"""Slow references of the metrics: plain loops over lists and numpy float64 arrays.

Written from the definitions, entry by entry, and importing nothing of smearlens. Patterns are
arrays [batch head query key]; a prepared row is a dictionary from allowed key to weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

NAN = float("nan")
Row = dict[int, float]


@dataclass(frozen=True)
class Leave:
    """What to leave out of rows; masks are arrays [batch position] of bool."""

    exclude_bos: bool = False
    exclude_self: bool = False
    renormalise: bool = True
    query_mask: np.ndarray | None = None
    key_mask: np.ndarray | None = None
    causal: bool = True

    def row(self, pattern: np.ndarray, b: int, h: int, q: int) -> Row | None:
        """One row over its allowed keys, or None if it does not count."""
        if self.query_mask is not None and not self.query_mask[b, q]:
            return None
        whole = [float(a) for a in pattern[b, h, q]]
        if any(math.isnan(a) for a in whole):
            return None
        kept = {k: whole[k] for k in range(len(whole)) if self.allows(b, q, k)}
        mass = sum(kept.values())
        if mass <= 0:
            return None
        some = self.exclude_bos or self.exclude_self or self.key_mask is not None
        if some and self.renormalise:
            kept = {k: a / mass for k, a in kept.items()}
        return kept

    def allows(self, b: int, q: int, k: int) -> bool:
        if (self.causal and k > q) or (self.exclude_bos and k == 0):
            return False
        if self.exclude_self and k == q:
            return False
        return self.key_mask is None or bool(self.key_mask[b, k])


def leave_of(options: Mapping[str, object], batch: int, *, causal: bool = True) -> Leave:
    """Options as given to the library (masks as tensors, with or without batch axis)."""
    given = {k: v for k, v in options.items() if not k.endswith("_mask")}
    for name in ("query_mask", "key_mask"):
        if name in options:
            mask = np.asarray(options[name])
            given[name] = np.broadcast_to(mask, (batch, mask.shape[-1]))
    return Leave(causal=causal, **given)


Value = Callable[[int, int, Row], "float | None"]  # of (example, query, row); None: undefined


def rows(pattern: np.ndarray, leave: Leave) -> Iterator[tuple[int, int, int, Row]]:
    """Every row that counts, as (example, head, query, row)."""
    batch, heads, queries, _ = pattern.shape
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                row = leave.row(pattern, b, h, q)
                if row is not None:
                    yield b, h, q, row


def per_example(pattern: np.ndarray, value: Value, leave: Leave) -> np.ndarray:
    """Mean over the valid rows, [example head]; NaN where there is none."""
    found: dict[tuple[int, int], list[float]] = {}
    for b, h, q, row in rows(pattern, leave):
        v = value(b, q, row)
        if v is not None:
            found.setdefault((b, h), []).append(v)
    batch, heads = pattern.shape[:2]
    return np.array(
        [
            [mean(found[b, h]) if (b, h) in found else NAN for h in range(heads)]
            for b in range(batch)
        ]
    )


def pooled(pattern: np.ndarray, value: Value, leave: Leave) -> np.ndarray:
    """Mean over the rows of all examples together, [head]."""
    found: list[list[float]] = [[] for _ in range(pattern.shape[1])]
    for b, h, q, row in rows(pattern, leave):
        v = value(b, q, row)
        if v is not None:
            found[h].append(v)
    return np.array([mean(f) if f else NAN for f in found])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis, NaN left out."""
    columns = [[v for v in column if not math.isnan(v)] for column in values.T]
    return np.array([mean(c) if c else NAN for c in columns])


def uniform(batch: int, queries: int, keys: int, *, causal: bool) -> np.ndarray:
    """Equal weight on every key that a query may see, [batch 1 query key]."""
    pattern = np.zeros((batch, 1, queries, keys))
    for q in range(queries):
        allowed = q + 1 if causal else keys
        pattern[:, :, q, :allowed] = 1 / allowed
    return pattern


def softmax(scores: np.ndarray, *, causal: bool) -> np.ndarray:
    """Of each row over its allowed keys, [… query key]."""
    out = np.zeros(scores.shape)
    for place in np.ndindex(scores.shape[:-1]):
        allowed = range(place[-1] + 1) if causal else range(scores.shape[-1])
        top = max(float(scores[place][k]) for k in allowed)
        parts = {k: math.exp(float(scores[place][k]) - top) for k in allowed}
        for k, part in parts.items():
            out[(*place, k)] = part / sum(parts.values())
    return out


def attention(q: np.ndarray, k: np.ndarray, *, causal: bool) -> np.ndarray:
    """Pattern of q and k [batch pos head d_head], [batch head query key]."""
    batch, n_query, heads, width = q.shape
    scores = np.zeros((batch, heads, n_query, k.shape[1]))
    for b, h, i, j in np.ndindex(scores.shape):
        products = [float(q[b, i, h, d]) * float(k[b, j, h, d]) for d in range(width)]
        scores[b, h, i, j] = sum(products) / math.sqrt(width)
    return softmax(scores, causal=causal)


def random_pattern(
    seed: int, batch: int, heads: int, queries: int, keys: int | None = None, *, causal: bool = True
) -> np.ndarray:
    """Softmax of independent normal scores."""
    keys = queries if keys is None else keys
    scores = np.random.default_rng(seed).normal(size=(batch, heads, queries, keys))
    return softmax(2 * scores, causal=causal)


# Scores with a target ----------------------------------------------------------------------------


def prev_token(b: int, q: int, row: Row) -> float | None:
    return row.get(q - 1)


def other_past(b: int, q: int, row: Row) -> float | None:
    """Mean weight on the keys before the previous token."""
    others = [a for k, a in row.items() if k <= q - 2]
    return mean(others) if others else None


def prefix(
    tokens: np.ndarray, offset: int, *, aggregate: str = "sum", boundary: bool = True
) -> Value:
    """Weight on k + offset (0..q) for k < q with the token of q."""

    def value(b: int, q: int, row: Row) -> float | None:
        x = [int(t) for t in tokens[b]]
        if not boundary:
            arrivals = [(x[j - 1], x[j]) for j in range(1, q)]
            if q == 0 or (x[q - 1], x[q]) not in arrivals:
                return None
        places = {k + offset for k in range(q) if x[k] == x[q] and 0 <= k + offset <= q}
        weights = [row[p] for p in places if p in row]
        if not weights:
            return None
        return sum(weights) if aggregate == "sum" else mean(weights)

    return value


def stripe_row(detection: np.ndarray) -> Value:
    """Detected weight of rows with a detected key; `detection` is [batch query key]."""

    def value(b: int, q: int, row: Row) -> float | None:
        hits = [a for k, a in row.items() if detection[b, q, k]]
        return sum(hits) if hits else None

    return value


def stripe_abs(detection: np.ndarray) -> Value:
    def value(b: int, q: int, row: Row) -> float | None:
        return 1 - sum(abs(a - float(detection[b, q, k])) for k, a in row.items())

    return value


def stripe_mul(pattern: np.ndarray, detection: np.ndarray, leave: Leave) -> np.ndarray:
    """Σ A·D / Σ A of each example and head."""
    above = np.zeros(pattern.shape[:2])
    below = np.zeros(pattern.shape[:2])
    for b, h, q, row in rows(pattern, leave):
        for k, a in row.items():
            above[b, h] += a * float(detection[b, q, k])
            below[b, h] += a
    return above / below


def alignment(aligned: np.ndarray, shift: int) -> Value:
    def value(b: int, q: int, row: Row) -> float | None:
        return row.get(int(aligned[b, q]) + shift) if aligned[b, q] >= 0 else None

    return value


def alignment_hit(aligned: np.ndarray, shift: int) -> Value:
    """1 where the largest weight lies on the aligned key (a tie counts in equal parts)."""

    def value(b: int, q: int, row: Row) -> float | None:
        here = int(aligned[b, q]) + shift
        if aligned[b, q] < 0 or here not in row:
            return None
        best = [k for k, a in row.items() if a == max(row.values())]
        return (here in best) / len(best)

    return value


# Statistics of rows ------------------------------------------------------------------------------


def xlogx(a: float) -> float:
    return a * math.log(a) if a > 0 else 0.0


def entropy(b: int, q: int, row: Row) -> float:
    return -sum(xlogx(a) for a in row.values())


def normalised_entropy(b: int, q: int, row: Row) -> float | None:
    return entropy(b, q, row) / math.log(len(row)) if len(row) > 1 else None


def effective_tokens(b: int, q: int, row: Row) -> float:
    return math.exp(entropy(b, q, row))


def distance(b: int, q: int, row: Row) -> float:
    return sum(a * abs(q - k) for k, a in row.items())


def relative_distance(b: int, q: int, row: Row) -> float | None:
    return distance(b, q, row) / q if q > 0 else None


def span(mass: float) -> Value:
    """Smallest w with at least `mass` on q-w..q; undefined where the keys up to q hold less."""

    def value(b: int, q: int, row: Row) -> float | None:
        for w in range(q + 1):
            if sum(row.get(k, 0.0) for k in range(q - w, q + 1)) >= mass - 1e-6:
                return float(w)
        return None

    return value


def sink(b: int, q: int, row: Row) -> float | None:
    return row.get(0)


def on_self(b: int, q: int, row: Row) -> float | None:
    return row.get(q)


def future(b: int, q: int, row: Row) -> float:
    return sum(a for k, a in row.items() if k > q)


def lag_profile(
    pattern: np.ndarray, lags: Sequence[int], leave: Leave, *, everywhere: bool = False
) -> np.ndarray:
    """Mean over valid rows of A[q, q - l], [example head lag].

    A row counts at the lags where its key exists; `everywhere` counts it at all, with weight 0.
    """
    keys = pattern.shape[3]

    def at(lag: int) -> Value:
        def value(b: int, q: int, row: Row) -> float | None:
            return row.get(q - lag, 0.0) if everywhere or 0 <= q - lag < keys else None

        return value

    return np.stack([per_example(pattern, at(lag), leave) for lag in lags], -1)


# Pairs of distributions --------------------------------------------------------------------------


def kl(p: Row, q: Row) -> float:
    return sum(a * math.log(a / q[k]) for k, a in p.items() if a > 0)


def js(p: Row, q: Row) -> float:
    keys = sorted({*p, *q})
    p, q = ({k: d.get(k, 0.0) for k in keys} for d in (p, q))
    middle = {k: (p[k] + q[k]) / 2 for k in keys}
    return kl(p, middle) / 2 + kl(q, middle) / 2


def head_diversity(pattern: np.ndarray, leave: Leave) -> np.ndarray:
    """Mean over pairs of heads and rows of JS / log 2; rows with one allowed key left out."""
    batch, heads, queries, _ = pattern.shape
    found = []
    for b in range(batch):
        values = []
        for q in range(queries):
            kept = [leave.row(pattern, b, h, q) for h in range(heads)]
            if None in kept or len(kept[0]) < 2:
                continue
            values += [js(one, two) / math.log(2) for one, two in combinations(kept, 2)]
        found.append(mean(values) if values else NAN)
    return np.array(found)


def head_variance(pattern: np.ndarray, leave: Leave) -> np.ndarray:
    """Mean over allowed (q, k) of valid rows of the unbiased variance across heads."""
    batch, heads, queries, _ = pattern.shape
    found = []
    for b in range(batch):
        values = []
        for q in range(queries):
            kept = [leave.row(pattern, b, h, q) for h in range(heads)]
            if None not in kept:
                values += [float(np.var([row[k] for row in kept], ddof=1)) for k in kept[0]]
        found.append(mean(values) if values else NAN)
    return np.array(found)


def joint_rows(p: np.ndarray, q: np.ndarray, b: int, one: Sequence[int], two: Sequence[int], leave):
    """Rows valid in both, each the mean over the heads `one` of p and `two` of q."""
    for i in range(p.shape[2]):
        rows_p = [leave.row(p, b, h, i) for h in range(p.shape[1])]
        rows_q = [leave.row(q, b, h, i) for h in range(q.shape[1])]
        if None in rows_p or None in rows_q:
            continue
        yield [
            {k: mean([kept[h][k] for h in heads]) for k in kept[0]}
            for kept, heads in ((rows_p, one), (rows_q, two))
        ]


def js_similarity(p, q, b, one, two, leave: Leave) -> float:
    values = [
        1 - js(x, y) / math.log(2) for x, y in joint_rows(p, q, b, one, two, leave) if len(x) > 1
    ]
    return mean(values) if values else NAN


def cosine(p, q, b, one, two, leave: Leave, *, centred: bool) -> float:
    dot = left = right = 0.0
    for x, y in joint_rows(p, q, b, one, two, leave):
        even = 1 / len(x) if centred else 0.0
        for k in x:
            dot += (x[k] - even) * (y[k] - even)
            left += (x[k] - even) ** 2
            right += (y[k] - even) ** 2
    return dot / math.sqrt(left * right) if left * right > 0 else NAN


def layer_similarity(p: np.ndarray, q: np.ndarray, kind: str, heads: str, leave: Leave) -> float:
    """Mean over examples; heads by their mean, or by the best of all one-to-one matchings."""

    def compare(b: int, one: Sequence[int], two: Sequence[int]) -> float:
        if kind == "js":
            return js_similarity(p, q, b, one, two, leave)
        return cosine(p, q, b, one, two, leave, centred=kind == "centred")

    n_p, n_q = p.shape[1], q.shape[1]
    values = []
    for b in range(p.shape[0]):
        if heads == "mean":
            values.append(compare(b, range(n_p), range(n_q)))
            continue
        table = [[compare(b, [i], [j]) for j in range(n_q)] for i in range(n_p)]
        values.append(
            max(mean([table[i][j] for i, j in enumerate(m)]) for m in permutations(range(n_q), n_p))
        )
    return float(nanmean(np.array(values)[:, None])[0])


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """|Yc' Xc|² / (|Xc' Xc| |Yc' Yc|), entry by entry."""
    x, y = (
        [[float(a) - mean([float(r[c]) for r in t]) for c, a in enumerate(row)] for row in t]
        for t in (x, y)
    )

    def square(s, t) -> float:
        total = 0.0
        for i in range(len(s[0])):
            for j in range(len(t[0])):
                total += sum(a[i] * b[j] for a, b in zip(s, t, strict=True)) ** 2
        return total

    return square(x, y) / math.sqrt(square(x, x) * square(y, y))


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC as the U-statistic over all ordered quadruples of different tokens."""
    k, l = x @ x.T, y @ y.T  # noqa: E741
    terms = [
        k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in permutations(range(len(x)), 4)
    ]
    return mean(terms)


# Convolution -------------------------------------------------------------------------------------


def conv_matrix(kernel: np.ndarray, lags: Sequence[int], length: int) -> np.ndarray:
    """M[c, q, k] = kernel[c, i] where q - k = lags[i]."""
    out = np.zeros((kernel.shape[0], length, length))
    for c in range(kernel.shape[0]):
        for q in range(length):
            for k in range(length):
                for i, lag in enumerate(lags):
                    if q - k == lag:
                        out[c, q, k] = kernel[c, i]
    return out


def composed(pattern: np.ndarray, gain: np.ndarray, lags: Sequence[int]) -> np.ndarray:
    """E[h, q, s] = Σ_l A[h, q, s + l] g[h, l]."""
    out = np.zeros(pattern.shape)
    for b, h, q, s in np.ndindex(pattern.shape):
        for i, lag in enumerate(lags):
            if 0 <= s + lag < pattern.shape[3]:
                out[b, h, q, s] += pattern[b, h, q, s + lag] * gain[h, i]
    return out


def score_of_lag(q, x, kernel_column, w_k, lag: int) -> np.ndarray:
    """q_q · W_K' (w_l x_{k-l}) / √d, [batch head query key]."""
    batch, length, heads, width = q.shape
    out = np.zeros((batch, heads, length, length))
    for b, h, i, k in np.ndindex(out.shape):
        if not 0 <= k - lag < length:
            continue
        for d in range(width):
            key = sum(
                float(kernel_column[m]) * float(x[b, k - lag, m]) * float(w_k[h, m, d])
                for m in range(x.shape[2])
            )
            out[b, h, i, k] += float(q[b, i, h, d]) * key / math.sqrt(width)
    return out


def smear_evidence(scores: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Mean over rows of: mean score on the induction keys minus that on the other valid keys."""
    batch, heads, length, _ = scores.shape
    out = np.full((batch, heads), NAN)
    for b in range(batch):
        for h in range(heads):
            values = []
            for q in range(length):
                keys = {k + 1 for k in range(q) if tokens[b, k] == tokens[b, q]}
                others = [k for k in range(q + 1) if k not in keys]
                if keys:
                    on = mean([float(scores[b, h, q, k]) for k in keys])
                    values.append(on - mean([float(scores[b, h, q, k]) for k in others]))
            if values:
                out[b, h] = mean(values)
    return out


# Behaviour ---------------------------------------------------------------------------------------


def losses(logits: np.ndarray, tokens: np.ndarray) -> list[dict[int, float]]:
    """Per example: token index i >= 1 to its cross entropy under the logits at i - 1."""
    found = []
    for b in range(tokens.shape[0]):
        of: dict[int, float] = {}
        for i in range(1, tokens.shape[1]):
            row = [float(z) for z in logits[b, i - 1]]
            top = max(row)
            of[i] = top + math.log(sum(math.exp(z - top) for z in row)) - row[int(tokens[b, i])]
        found.append(of)
    return found


def predictable(x: Sequence[int], i: int) -> bool:
    """Whether the token before index i stood earlier, so that its follower can be recalled."""
    return any(x[j] == x[i - 1] for j in range(i - 1))


def where(values: Mapping[int, float], chosen: Callable[[int], bool]) -> float:
    kept = [v for i, v in values.items() if chosen(i)]
    return mean(kept) if kept else NAN


# Intervals ---------------------------------------------------------------------------------------


def bootstrap(values: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean, one resample after the other."""
    generator = np.random.default_rng(seed)
    means = [float(np.mean(generator.choice(values, len(values)))) for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
