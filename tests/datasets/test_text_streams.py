"""Streams of text: every token of an evaluated text once, training in order, on any number of devices the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vmoe_momentum.datasets.text_streams import TextLoader, TextPlan, swap_words

EOS = 999


def text(tokens: int) -> np.ndarray:
    """No token twice, so that each tells its place."""
    return np.arange(tokens, dtype=np.int32) + 5000


def batches(tokens: int, streams: int, block: int, training: bool, epoch: int = 0, ids=None, **settings) -> list:
    plan = TextPlan(tokens, streams, block, training=training, **settings)
    loader = TextLoader(plan, text(tokens) if ids is None else ids, EOS)
    loader.set_epoch(epoch)
    found = list(loader)
    assert len(found) == len(loader)
    return found


def joined(found: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and targets of whole streams, [B, all tokens]."""
    return torch.cat([batch.words for batch in found], 1), torch.cat([batch.targets for batch in found], 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("streams", [3, 4, 7])
@pytest.mark.parametrize("block", [1, 4, 64])
def test_evaluation_predicts_every_token_once(block, streams, world_size):
    for tokens in (1, 2, 3, 5, 8, 27, 28, 29, 63, 64, 65, 100):
        ranks = [batches(tokens, streams, block, False, rank=r, world_size=world_size) for r in range(world_size)]
        assert len({len(found) for found in ranks}) == 1  # else collectives would wait for ever
        seen = []
        for rank, found in enumerate(ranks):
            assert [batch.begins for batch in found] == [True] + [False] * (len(found) - 1)
            assert all(batch.words.shape == batch.targets.shape for batch in found)
            assert all(batch.words.dtype == batch.targets.dtype == torch.int64 for batch in found)
            assert all(batch.clean_targets is None for batch in found)
            words, targets = joined(found)
            assert len(words) == len(range(rank, streams, world_size))
            assert {batch.words.shape[1] for batch in found[:-1]} <= {block}
            for row_words, row_targets in zip(words.tolist(), targets.tolist(), strict=True):
                real = [pair for pair in zip(row_words, row_targets, strict=True) if pair[1] != -100]
                assert list(zip(row_words, row_targets, strict=True))[len(real) :] == [(0, -100)] * (
                    len(row_words) - len(real)
                )
                assert all(word == (EOS if target == 5000 else target - 1) for word, target in real)
                assert [target for _, target in real] == [real[0][1] + k for k in range(len(real))] if real else True
                seen += [target for _, target in real]
        assert sorted(seen) == text(tokens).tolist()


@pytest.mark.parametrize(("streams", "world_size"), [(6, 1), (3, 2), (2, 3), (1, 6)])
@pytest.mark.parametrize("tokens", [83, 90, 96, 113])
def test_training_reads_what_a_naive_loop_does_on_any_number_of_devices(tokens, streams, world_size):
    block = 5
    for epoch in (0, 1, 2):
        offset = int(np.random.default_rng([3, epoch]).integers(block))
        length = (tokens - offset) // 6
        expected = []
        for stream in range(6):
            first = offset + stream * length
            expected.append(text(tokens).tolist()[first : first + length])
        for rank in range(world_size):
            found = batches(tokens, streams, block, True, epoch, seed=3, rank=rank, world_size=world_size)
            assert {batch.words.shape for batch in found} == {(streams, block)}
            words, targets = joined(found)
            assert targets.tolist() == [row[: targets.shape[1]] for row in expected[rank::world_size]]
            before = torch.where(targets == 5000, torch.tensor(EOS), targets - 1)
            assert torch.equal(words, before)
            assert [batch.begins for batch in found] == [True] + [False] * (len(found) - 1)


def test_epochs_and_seeds_read_from_offsets_of_their_own():
    def first(**settings) -> int:
        return int(batches(5000, 2, 64, True, **settings)[0].targets[0, 0]) - 5000

    offsets = [first(epoch=epoch, seed=seed) for seed in (0, 1) for epoch in range(4)]
    assert len(set(offsets)) > 5 and all(0 <= offset < 64 for offset in offsets)
    assert first(epoch=3) == first(epoch=3) and first(epoch=3, reshuffle=False) == first(epoch=0)
    lengths = {len(batches(5000 + extra, 2, 64, True, epoch)) for extra in range(40) for epoch in range(20)}
    assert lengths == {38}  # the same in every epoch, whatever its offset


def test_too_little_text_or_too_few_streams_are_refused():
    with pytest.raises(ValueError, match=r"data\.batch_size=4 and data\.block_size=8 on 2 .* need 71 .* found 70;"):
        TextPlan(70, 4, 8, training=True, world_size=2)
    assert len(TextPlan(71, 4, 8, training=True, world_size=2)) == 1
    with pytest.raises(ValueError, match="found 1"):
        TextPlan(1, 1, 8, training=True)
    with pytest.raises(ValueError, match=r"data\.eval_batch_size=3: too few streams .* 4 devices.*at least 4"):
        TextPlan(70, 3, 8, training=False, world_size=4)


def same(left, right) -> bool:
    return left.begins == right.begins and torch.equal(left.words, right.words) and torch.equal(*[
        batch.targets for batch in (left, right)])  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_run_goes_on_at_every_batch(world_size):
    """On as many streams in all, whatever the number of devices."""
    whole = batches(200, 4, 8, True, epoch=1)
    for done in range(1, len(whole)):
        loader = TextLoader(TextPlan(200, 4, 8, training=True), text(200), EOS)
        loader.batch_sampler.sampler.set_epoch(1)
        source = iter(loader)
        assert all(same(next(source), whole[k]) for k in range(done))
        state = loader.state_dict()
        assert (state["epoch"], state["batch"]) == (1, done)
        for rank in range(world_size):
            plan = TextPlan(200, 4 // world_size, 8, training=True, rank=rank, world_size=world_size)
            other = TextLoader(plan, text(200), EOS)
            other.load_state_dict(state)
            iter(other)  # Lightning looks once and throws it away
            other.set_epoch(1)
            rest = list(other)
            assert len(rest) == len(whole) - done
            for batch, expected in zip(rest, whole[done:], strict=True):
                assert torch.equal(batch.targets, expected.targets[rank::world_size]) and not batch.begins
            assert len(list(other)) == len(whole)  # a position is used once


def test_a_position_in_another_order_is_refused():
    loader = TextLoader(TextPlan(200, 4, 8, training=True), text(200), EOS)
    next(iter(loader))
    state = loader.state_dict()
    others = {
        "data.seed=1": {"seed": 1}, "data.batch_size=2": {"batch_size": 2}, "data.block_size=4": {"block_size": 4},
        "tokens=201": {"tokens": 201},
    }  # fmt: skip
    for told, change in others.items():
        settings = {"tokens": 200, "batch_size": 4, "block_size": 8, "training": True} | change
        other = TextLoader(TextPlan(**settings), text(settings["tokens"]), EOS)
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=f"{told}: the checkpoint was saved inside an epoch with") as error:
            next(iter(other))
        assert "\n" not in str(error.value)


def test_more_streams_on_more_devices_go_on_with_the_next_epoch(capsys):
    loader = TextLoader(TextPlan(200, 4, 8, training=True), text(200), EOS)
    next(iter(loader))
    other = TextLoader(TextPlan(200, 4, 8, training=True, world_size=2), text(200), EOS)
    other.load_state_dict(loader.state_dict())
    assert list(other) == [] and len(list(other)) == len(other)
    told = "in steps of 4 streams on 1 devices; here they are 8 on 2: training goes on with the next epoch"
    assert told in capsys.readouterr().err


def test_a_word_swap_takes_its_share_and_spares_what_it_must(monkeypatch):
    ids = np.random.default_rng(0).integers(0, 50, 40000).astype(np.int32)
    swapped = swap_words(ids, 0.1, 50, [7, 8], [0, 1, 1])
    changed = swapped != ids
    assert set(swapped[changed].tolist()) == {50} and not changed[np.isin(ids, [7, 8])].any()
    share = changed.mean() / (~np.isin(ids, [7, 8])).mean()
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / len(ids)) ** 0.5
    assert not np.array_equal(swapped, swap_words(ids, 0.1, 50, [7, 8], [0, 2, 1]))
    monkeypatch.setattr("vmoe_momentum.datasets.text_streams._CHUNK", 77)
    assert np.array_equal(swapped, swap_words(ids, 0.1, 50, [7, 8], [0, 1, 1]))
