"""Closing heads of a frozen model: what is said with one closed is exact, and nobody chooses by what is tested."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastheads
from fastheads.hosts import find_tower
from fastheads.hosts.vision import answer
from fastheads.model import gate_parameters
from fastheads.train.criteria import CRITERIA, GATES, PULL, Seen, between, learned_gates
from fastheads.train.evaluation import image_features
from fastheads.train.frozen import CONFIG, RIDGE, Frozen, Measured, Said, ridge
from fastheads.train.heads import greedy, select_heads
from fastheads.train.recipe import Recipe

RECIPE = Recipe(batch_size=8)


@pytest.fixture(params=["base", "vit"])
def frozen(request):
    """A patched model on its problem, with text and with a linear head; and the stock one."""
    model = request.getfixturevalue(request.param)
    problem = request.getfixturevalue({"base": "problem", "vit": "vit_problem"}[request.param])
    stock = copy.deepcopy(model).double()
    fastheads.patch(model, CONFIG)
    return Frozen(model, problem, RECIPE), stock


def scaled(stock, layer, head, factor, count):
    """The stock model with a head's columns of the output projection times a factor."""
    attention = find_tower(stock, "visual").attentions[layer]
    weight = getattr(attention, "out_proj", getattr(attention, "proj", None)).weight
    width = weight.shape[1] // count
    with torch.no_grad():
        weight[:, head * width : (head + 1) * width] *= factor
    return stock


def features(stock, loader):
    """Of a stock model in float64."""
    with torch.no_grad():
        return torch.cat([answer(stock, images.double())[0] for images, _, _ in loader])


def test_a_closed_head_is_exact_though_the_blocks_below_it_are_not_computed_again(frozen):
    found, stock = frozen
    loader, count = found.loader("blue", range(12)), found.heads[-1][1] + 1
    more = [found.heads[0], found.heads[len(found.heads) // 2], found.heads[-1]]
    got, _ = found.features(loader, [*([head] for head in more), more[::-2]], "")
    assert got.shape[:2] == (5, 12)
    for row, closed in enumerate(([], *([head] for head in more), more[::-2])):  # the bits of the whole model
        with fastheads.masked(found.model, closed), torch.no_grad():
            whole = torch.cat([answer(found.model, images)[0] for images, _, _ in loader])
        assert torch.equal(got[row], whole)
    for row, (layer, head) in enumerate(more, 1):
        expected = features(scaled(copy.deepcopy(stock), layer, head, 0, count), loader)
        torch.testing.assert_close(got[row].double(), expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(block) for block in found.tower.blocks)


def test_gates_scale_what_heads_add_and_are_as_before_afterwards(frozen):
    found, stock = frozen
    loader, count, at = found.loader("blue", range(6)), found.heads[-1][1] + 1, len(found.heads) // 2
    gates, before = found.gates([]), [theta.clone() for theta in gate_parameters(found.model)]
    gates[at] = 1.3
    got, _ = found.features(loader, [gates], "")
    expected = features(scaled(copy.deepcopy(stock), *found.heads[at], 1.3, count), loader)
    torch.testing.assert_close(got[1].double(), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(before, gate_parameters(found.model), strict=True))


def test_what_is_measured_is_kept_and_heads_add_up(frozen, tmp_path):
    found, _ = frozen
    found.kept = tmp_path
    first = found.measured("red", None)  # the target's held-out images, as a source's
    found.model = None  # computed again it would fail
    again = found.measured("red", None)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True)) and len(first.labels) == 4
    closed = found.gates([found.heads[1]])
    torch.testing.assert_close(first.gated(closed), first.features[2])
    both = found.gates([found.heads[1], found.heads[2]])
    expected = first.features[2] + first.features[3] - first.features[0]
    torch.testing.assert_close(first.gated(torch.stack([closed, both]))[1], expected)


def test_ridge_is_the_least_squares_it_is_said_to_be():
    noise = torch.Generator().manual_seed(0)
    x, labels = 3 * torch.randn(12, 4, generator=noise), torch.arange(12) % 3
    weight, bias = ridge(x, labels, 3)
    size = x.double().norm(dim=1).mean()
    each = torch.cat([weight.double() * size, bias.double()[:, None]], 1).requires_grad_()
    logits = x.double() / size @ each[:, :-1].T + each[:, -1]
    loss = (logits - F.one_hot(labels, 3)).square().sum() + RIDGE * each.square().sum()
    (gradient,) = torch.autograd.grad(loss, each)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


def test_the_mmd_of_a_head_is_that_of_its_tokens(frozen):
    found, _ = frozen
    parts = [found.measured(name, 4).tokens for name in ("blue", "green")]
    ids = torch.tensor([0] * 4 + [1] * 4)
    for at in (0, len(found.heads) - 1):
        expected = fastheads.mmd(torch.cat([part[at] for part in parts]).double(), ids, impl="reference")
        torch.testing.assert_close(between(parts)[at].double(), expected, rtol=1e-4, atol=1e-5)


def test_criteria_close_the_head_that_they_are_said_to():
    """A classifier that takes features for logits; what heads add to them is given, of two sources."""
    noise = torch.Generator().manual_seed(0)
    # Head 0 helps one source and hurts the other, head 1 hurts both, head 2 helps both.
    adds = torch.tensor([[2.0, -1.0, 0.6], [-2.2, -1.0, 0.6]])
    sources = []
    for source in range(2):
        labels = torch.arange(20) % 5 > 0 if source == 0 else torch.arange(20) % 5 == 0
        right = F.one_hot(labels.long(), 2).float()
        plain = right + 0.3 * torch.randn(20, 2, generator=noise)
        tokens = torch.randn(3, 20, 4, generator=noise)
        # Head 0's token tells classes apart, of which the sources have other shares; head 1's tells sources apart.
        tokens[0] += 6 * labels[:, None]
        tokens[1] += 3 * source
        closed = plain - adds[source][:, None, None] * right
        sources.append(Measured(torch.cat([plain[None], closed]), labels.long(), tokens))
    seen = Seen(sources, lambda features: features, [lambda features: -features] * 2)
    scores = {name: score(seen) for name, (_, score) in CRITERIA.items()}
    first = {"loss": 1, "worst-source": 1, "spread": 0, "gradient": 1, "agreement": 1, "class-mmd": 1, "left-out": 2}
    assert {name: int(scores[name].argmax()) for name in first} == first
    assert min(scores["mmd"][:2]) > 10 * abs(scores["mmd"][2]) and scores["class-mmd"][0] < 0.1 * scores["class-mmd"][1]
    step = 1e-3 * torch.eye(3)
    nearby = [torch.stack([seen.risks(1 + sign * one) for one in step], 1) for sign in (1, -1)]
    torch.testing.assert_close(seen.gradients(), (nearby[0] - nearby[1]) / 2e-3, rtol=1e-2, atol=1e-3)
    expected = torch.stack([adds[0] / 2, adds[1] / 2]).double().std(0)  # over the mean of two logits: half is left
    torch.testing.assert_close(scores["spread"].double(), expected, rtol=1e-5, atol=1e-6)
    gates = torch.ones(3, dtype=torch.double, requires_grad=True)
    risks = []
    for own, added in zip(sources, adds.double(), strict=True):
        right = F.one_hot(own.labels, 2).double()
        logits = own.features[0].double() - ((1 - gates) * added).sum() * right
        risks.append((logits.logsumexp(1) - (logits * right).sum(1)).mean())
    mean = (risks[0] + risks[1]) / 2
    (expected,) = torch.autograd.grad(mean + 10 * ((risks[0] - mean) ** 2 + (risks[1] - mean) ** 2) / 2, gates)
    torch.testing.assert_close(scores["v-rex"].double(), expected, rtol=1e-4, atol=1e-5)


def test_learned_gates_are_where_objective_and_pull_meet():
    slope = torch.tensor([2.0, -1.0, 0.0])
    found = learned_gates(lambda gates: (slope * gates).sum(), torch.ones(3), steps=500)
    torch.testing.assert_close(found, 1 - slope * 3 / (2 * PULL), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("most", "closed"), [(4, [(0, 1), (1, 0)]), (1, [(0, 1)])])
def test_greedy_closes_what_helps_most_and_stops(most, closed):
    gains = {(0, 0): -1, (0, 1): 2, (1, 0): 1, (1, 1): 0}  # right answers of ten, which add up

    def tell(sets):
        right = [5 + sum(gains[head] for head in closed) for closed in sets]
        return Said(torch.tensor([[i < n for i in range(10)] for n in right]), torch.zeros(len(right), 10))

    assert greedy(list(gains), tell, most) == closed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"most": 0}, "most: got 0"),
        ({"most": 99}, "most: got 99"),
        ({"images": 1}, "images: "),
        ({"tested": 1}, "tested: "),
    ],
)
def test_too_little_to_choose_from_is_said_before_anything_is_measured(vit, vit_problem, monkeypatch, options, told):
    fastheads.patch(vit, CONFIG)
    monkeypatch.setattr(Frozen, "loader", None)
    with pytest.raises(ValueError, match=f"^{told}"):
        select_heads(vit, vit_problem, RECIPE, **options)


def test_what_is_chosen_is_tested_on_images_that_nobody_chose_by(vit, vit_problem, monkeypatch):
    fastheads.patch(vit, CONFIG)
    seen, loader = {}, Frozen.loader

    def watched(self, domain, indices):
        seen.setdefault(domain, []).append(set(indices or ()))
        return loader(self, domain, indices)

    fitted, rested, weights = Frozen.fitted, [], []

    def fitting(self, features, labels):
        rested.append(labels)
        weights.append(ridge(torch.cat(features), torch.cat(labels), 2)[0])
        return fitted(self, features, labels)

    monkeypatch.setattr(Frozen, "loader", watched)
    monkeypatch.setattr(Frozen, "fitted", fitting)
    record = select_heads(vit, vit_problem, RECIPE, most=2, images=3, tested=9)
    oracle, test = seen["red"]
    assert not oracle & test and len(oracle) == 3 and record["test_images"] == len(test) == 9
    for name in ("blue", "green"):
        everything, own = seen[name]  # of the head that is fitted; of criteria
        assert not everything and own <= set(vit_problem.validation[name]) and record["images"][name] == len(own) == 3
    blue, green = rested[-1]  # the labels that a refitted head has; without each in turn, where it is left out
    alone = [labels for labels, *others in rested if not others]
    assert len(alone) > 2 and all(x is green and y is blue for x, y in zip(alone[::2], alone[1::2], strict=True))
    rows = {row["name"]: row for row in record["selections"]}
    refits = dict(zip(rows, weights[-len(rows) :], strict=True))
    assert {0, 2} <= {len(row["heads"]) for row in rows.values() if row["heads"] is not None}

    def without(heads):
        """Features of what the sources are measured by."""
        with fastheads.masked(vit, heads):
            parts = [
                loader(Frozen(vit, vit_problem, RECIPE), name, sorted(seen[name][1])) for name in ("blue", "green")
            ]
            return torch.cat([image_features(vit, part)[0] for part in parts])

    assert list(rows) == ["none", *CRITERIA, *GATES, "random", "greedy", "greedy-left-out", "oracle", "oracle-gates"]
    for name, row in rows.items():
        for part in ("", "refit_"):
            gain = row[f"{part}target"] - rows["none"][f"{part}target"]
            assert row[f"{part}gain"] == pytest.approx(gain, abs=1e-6)
        if row["heads"] is not None:  # while choosing, what heads do adds up
            each = [without(row["heads"][:0]), *(without([head]) for head in row["heads"])]
            added = each[0] + sum((one - each[0] for one in each[1:]), torch.zeros_like(each[0]))
            torch.testing.assert_close(refits[name], ridge(added, torch.cat(rested[-1]), 2)[0], rtol=1e-3, atol=1e-5)
        if row["heads"] is None:
            assert (name in GATES or name == "oracle-gates") and len(row["gates"]) == len(record["heads"])
            continue
        assert len(row["heads"]) <= 2
        order = [(h["layer"], h["head"]) for h in sorted(record["heads"], key=lambda h: -h["scores"].get(name, 0))][:2]
        assert name not in CRITERIA or row["heads"] == list(map(list, order[: len(row["heads"])]))
        assert name in ("oracle", "greedy-left-out") or row["sources"] >= rows["none"]["sources"]
