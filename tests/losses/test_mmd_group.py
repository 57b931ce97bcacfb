"""`mmd(..., group=)`: processes with their own rows give one process's loss and, after DDP's mean, its gradients."""

import pytest
import torch
from mmd_ranks import batch, build, build_patched, head_loss, head_mmd_on_rank, loss_of, mmd_on_rank
from processes import free_port, on_ranks

import fastheads

CASES = {
    2: [
        dict(kernel="adaptive", sizes=[9, 9], reduction="mean", impl="auto"),
        dict(kernel="domainbed", sizes=[4, 11], reduction="mean", impl="auto"),
        dict(kernel="dan", sizes=[7, 9], reduction="none", impl="auto"),
        dict(kernel="adaptive", sizes=[12, 6], reduction="mean", impl="reference"),
        dict(kernel="domainbed", sizes=[0, 12], reduction="none", impl="reference"),
        dict(kernel="dan", sizes=[0, 14], reduction="mean", impl="auto"),
        dict(kernel="domainbed", sizes=[7, 8], reduction="mean", impl="auto", weighted=True),
    ],
    4: [
        dict(kernel="adaptive", sizes=[8, 3, 6, 7], reduction="mean", impl="auto"),
        dict(kernel="domainbed", sizes=[1, 9, 0, 5], reduction="none", impl="auto"),
        dict(kernel="dan", sizes=[4, 1, 6, 2], reduction="mean", impl="reference", weighted=True),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("world", CASES)
def test_processes_give_one_process_loss_and_gradients(world, tmp_path):
    on_ranks(mmd_on_rank, world, world, free_port(), CASES[world], tmp_path)
    for i, case in enumerate(CASES[world]):
        model = build()
        x, domains, _ = batch(case)
        loss = loss_of(model(x), domains, case)
        loss.backward()
        largest = max(float(p.grad.abs().max()) for p in model.parameters())
        for rank in range(world):
            found = torch.load(tmp_path / f"{i}-{rank}.pt")
            torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-12, atol=1e-12, msg=str(case))
            for grad, p in zip(found["grads"], model.parameters(), strict=True):
                # float64 sums in another order: far inside the 1e-6 of the largest that users are promised
                assert (grad - p.grad).abs().max() <= 1e-10 * largest, case


@pytest.mark.slow
def test_two_processes_give_one_process_gates_gradient(tmp_path):
    """`head_mmd(..., group=)` of a patched model under DDP, uneven batches: the gates' gradient is one process's."""
    on_ranks(head_mmd_on_rank, 2, 2, free_port(), tmp_path)
    model = build_patched()
    loss = head_loss(model, slice(None))
    loss.backward()
    wanted = [theta.grad for theta in fastheads.gate_parameters(model)]
    largest = max(float(grad.abs().max()) for grad in wanted)
    assert largest > 0
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-10, atol=1e-12)
        for grad, expected in zip(found["grads"], wanted, strict=True):
            # float64: far inside the 1e-6 of the largest that users are promised
            assert (grad - expected).abs().max() <= 1e-8 * largest


def test_a_group_needs_an_initialised_process_group():
    with pytest.raises(ValueError, match="group.*init_process_group"):
        fastheads.mmd(torch.randn(6, 4), torch.arange(6) % 2, group=object())
