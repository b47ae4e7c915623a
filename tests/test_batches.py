"""Windows in batches: shuffled for training, longest first for tagging."""

import tiny

from ner import batches
from ner.windows import Windower


def windows_of_many_lengths():
    sentences = [list("京" * (1 + 37 * n % 120)) for n in range(2000)]
    return Windower(tiny.wordpiece(), "character", True, 256).windows(sentences)


def test_batches_hold_like_lengths_in_an_order_drawn_from_the_seed():
    windows = windows_of_many_lengths()
    first, again, other = (batches.shuffled(windows, 16, seed) for seed in (1, 1, 2))
    assert first == again != other
    for made in (first, other, batches.by_length(windows, 16)):
        assert sorted(w.sentence for batch in made for w in batch) == list(range(2000))
        real = sum(len(w.ids) for batch in made for w in batch)
        padded = sum(max(len(w.ids) for w in batch) * len(batch) for batch in made)
        assert real / padded > 0.95, "hardly any padding"
    longest = [len(batch[0].ids) for batch in first]
    assert longest != sorted(longest, reverse=True) and max(map(len, first)) == 16
    ordered = [len(w.ids) for batch in batches.by_length(windows, 16) for w in batch]
    assert ordered == sorted(ordered, reverse=True)
    assert {frozenset(w.sentence for w in batch) for batch in first} != {
        frozenset(w.sentence for w in b) for b in other
    }


def test_tagging_bounds_the_tokens_of_a_batch():
    windows = windows_of_many_lengths()
    made = batches.by_length(windows, 16, max_tokens=256)
    assert sum(map(len, made)) == len(windows) and all(len(batch) == 1 or padded(batch) <= 256 for batch in made)
    assert max(map(len, made)) == 16 and any(len(batch) < 16 for batch in made[:-1])


def test_a_small_change_of_the_seed_changes_the_order_and_not_the_windows():
    windows = windows_of_many_lengths()[:40]
    orders = {tuple(w.sentence for batch in batches.shuffled(windows, 4, seed) for w in batch) for seed in range(5)}
    assert len(orders) == 5 and len({tuple(sorted(order)) for order in orders}) == 1


def test_ids_and_mask_need_no_gold():
    batch = windows_of_many_lengths()[:3]
    ids, mask = batches.padded(batch, 9)
    tensors = batches.collate(batch, 9, None)
    assert tensors.keys() == {"input_ids", "attention_mask"}
    assert (tensors["input_ids"].numpy() == ids).all() and (tensors["attention_mask"].numpy() == mask).all()
    assert (ids[mask == 0] == 9).all()


def padded(batch):
    longest = max(len(window.ids) for window in batch)
    return len(batch) * (longest + -longest % batches.LENGTH_STEP)
