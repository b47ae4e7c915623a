"""Scores → tags: argmax or Viterbi; tags → spans, the one definition of an entity."""

import numpy as np

FORBIDDEN = np.float32(-1e30)  # finite, so that sums of it with themselves and with scores stay comparable


def decode(scores: list[np.ndarray], labels: list[str], how: str) -> list[np.ndarray]:
    """Label indices, int64 [n], for each sentence's scores [n, labels]; `how` is "argmax" or "viterbi"."""
    if how == "viterbi":
        return viterbi(scores, labels)
    return [np.argmax(rows, axis=-1) if len(rows) else np.zeros(0, np.int64) for rows in scores]


def viterbi(scores: list[np.ndarray], labels: list[str]) -> list[np.ndarray]:
    """The best label indices, int64 [n], that IOB2 allows, for each sentence's log-probabilities [n, labels].

    Exact. Without the constraint argmax would be best, and nearly everywhere it is well-formed already. So argmax
    stands, and only stretches around a forbidden step are solved by dynamic programming, all of them in one batch per
    length; they grow until no step is forbidden. What is best with some steps unchecked, and checks, is best of all.
    """
    lengths = [len(rows) for rows in scores]
    if not sum(lengths):
        return [np.zeros(0, np.int64) for _ in scores]
    flat = np.concatenate([rows for rows in scores if len(rows)]).astype(np.float32)
    flat = np.nan_to_num(flat, copy=False, nan=-1e9, neginf=-1e9, posinf=1e9)
    inside = np.array([label.startswith("I-") for label in labels])
    allowed = np.array([[after[:2] != "I-" or before[1:] == after[1:] for after in labels] for before in labels])
    begins = np.cumsum([0] + [n for n in lengths if n])[:-1]
    flat[begins[:, None], np.flatnonzero(inside)] = FORBIDDEN  # no sentence starts inside an entity
    path = flat.argmax(axis=1)
    cut = np.ones(len(flat), bool)  # True where a stretch begins, that is, where the step is not looked at
    radius = 2
    while len(clash := np.flatnonzero(~allowed[path[:-1], path[1:]] & cut[1:])):
        depth = np.zeros(len(flat) + 1, np.int64)
        np.add.at(depth, np.maximum(clash + 1 - radius, 0), 1)
        np.add.at(depth, np.minimum(clash + 2 + radius, len(flat)), -1)
        cut &= np.cumsum(depth[:-1]) == 0
        cut[begins] = True
        radius *= 2
        _solve(flat, np.flatnonzero(cut), np.where(allowed, np.float32(0), FORBIDDEN), path)
    return np.split(path, np.cumsum(lengths)[:-1])


def _solve(flat: np.ndarray, begins: np.ndarray, steps: np.ndarray, path: np.ndarray) -> None:
    """Viterbi over the stretches of `flat` [N, labels] that begin at `begins`; writes those longer than 1 into `path`.

    Stretches of like length (to the next power of two) are padded with rows in which only O, label 0, costs nothing.
    """
    sizes = np.diff(np.append(begins, len(flat)))
    widths = 1 << np.ceil(np.log2(sizes)).astype(int)
    for width in np.unique(widths[sizes > 1]):
        chosen = np.flatnonzero((widths == width) & (sizes > 1))
        for group in np.array_split(chosen, -(-len(chosen) * width // 262_144)):  # bounds the memory
            time = begins[group][:, None] + np.arange(width)
            real = np.arange(width) < sizes[group][:, None]
            emit = np.where(real[:, :, None], flat[np.minimum(time, len(flat) - 1)], FORBIDDEN)
            emit[~real, 0] = 0
            best, back = emit[:, 0], np.empty((width, *emit[:, 0].shape), np.int16)
            for t in range(1, width):
                options = best[:, :, None] + steps
                back[t] = options.argmax(axis=1)
                best = options.max(axis=1) + emit[:, t]
            labels = np.empty(time.shape, np.int64)
            labels[:, -1] = best.argmax(axis=1)
            for t in range(width - 1, 0, -1):
                labels[:, t - 1] = back[t, np.arange(len(group)), labels[:, t]]
            path[time[real]] = labels[real]


def spans(tags: list[str]) -> list[tuple[str, int, int]]:
    """The entities of IOB2 tags as (type, start, end), half-open; an orphan I starts one."""
    found, kind, start = [], None, 0
    for index, tag in enumerate(tags):
        if kind is not None and tag != "I-" + kind:
            found.append((kind, start, index))
            kind = None
        if kind is None and tag != "O":
            kind, start = tag[2:], index
    if kind is not None:
        found.append((kind, start, len(tags)))
    return found
