"""Shares of a batch: nothing twice, nothing left out, equal parts."""

import pytest
import torch

from expunge.train.latents import Request
from expunge.train.share import Share


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_shares_are_the_whole(count) -> None:
    n, m = 2 * count, 3 * count
    shares = [Share(i, count).rows(n, m) for i in range(count)]
    assert sorted(row for rows in shares for row in rows) == list(range(n + m))
    assert all(sum(row < n for row in rows) == 2 for rows in shares)
    # The mean over processes of their means is the mean of the batch.
    loss = torch.rand(n + m, generator=torch.Generator().manual_seed(0))
    means = torch.stack([loss[rows[:2]].mean() + loss[rows[2:]].mean() for rows in shares])
    torch.testing.assert_close(means.mean(), loss[:n].mean() + loss[n:].mean())


def test_one_process_has_all_of_it_in_order() -> None:
    assert Share().rows(2, 3) == [0, 1, 2, 3, 4]
    x = torch.rand(5)
    assert Share().gather(x, 2, 3) is x


def test_of_a_request_it_is_what_stands_in_those_rows() -> None:
    whole = Request([(f"e{i}", "e") for i in range(4)], [(f"r{i}", "r") for i in range(2)])
    for share in (Share(0, 2), Share(1, 2)):
        rows = share.rows(*whole.sizes)
        assert whole.of(share).made_with == [whole.made_with[row] for row in rows]
    assert Request([("e", "e")] * 2, []).of(Share(1, 2)).retained == []
