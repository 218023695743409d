"""What a frozen network said is asked once, and for the rest anew."""

import torch

from expunge.train.memory import Batch, Memory, Request

x_t, t = torch.zeros(3, 4, 2, 2), torch.tensor([1, 2, 3])
REQUEST = Request([("a", "a")] * 2, [("b", "b")])


def test_a_prediction_is_lacking_until_it_is_kept() -> None:
    batch = Batch(REQUEST, x_t, t)
    assert batch.lacks("teacher/null").tolist() == [True, True]
    assert batch.lacks("teacher/retained").tolist() == [True]
    batch.keep("teacher/null", torch.tensor([False, True]), torch.ones(1, 4, 2, 2))
    assert batch.lacks("teacher/null").tolist() == [True, False]
    assert batch.lacks("teacher/concept").tolist() == [True, True]
    assert batch.recall("teacher/null").mean((1, 2, 3)).tolist() == [0, 1]


def test_batches_that_share_a_memory_meet_at_their_places() -> None:
    memory = {"erased": Memory(5), "retained": Memory(4)}
    first = {"erased": torch.tensor([4, 0]), "retained": torch.tensor([2])}
    then = {"erased": torch.tensor([0, 3]), "retained": torch.tensor([2])}
    one = Batch(REQUEST, x_t, t, memory, first)
    one.keep("teacher/null", torch.tensor([True, True]), torch.stack([x_t[0] + 4, x_t[0] + 7]))
    one.keep("teacher/retained", torch.tensor([True]), x_t[:1] + 9)
    other = Batch(REQUEST, x_t, t, memory, then)
    assert other.lacks("teacher/null").tolist() == [False, True]
    assert not other.lacks("teacher/retained").any()
    assert other.recall("teacher/null")[0].unique().tolist() == [7]
    assert other.recall("teacher/retained").unique().tolist() == [9]


def test_a_memory_comes_back_from_its_state() -> None:
    memory = Memory(3)
    memory.keep("teacher/null", torch.tensor([1]), torch.full((1, 2), 5.0))
    again = Memory.of(memory.state_dict())
    places = torch.arange(3)
    assert again.lacks("teacher/null", places).tolist() == [True, False, True]
    assert torch.equal(again.values["teacher/null"], memory.values["teacher/null"])


def test_what_is_kept_has_no_gradient_and_full_precision() -> None:
    memory = Memory(1)
    memory.keep("a/b", torch.tensor([0]), torch.ones(1, 2, dtype=torch.bfloat16).requires_grad_())
    assert memory.values["a/b"].dtype == torch.float32
    assert not memory.values["a/b"].requires_grad
