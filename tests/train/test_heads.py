"""Closing heads of a frozen model: what is said with one closed is exact, and nobody chooses by what is tested."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastheads
from fastheads.hosts import find_tower
from fastheads.train.evaluation import fit_head
from fastheads.train.heads import CONFIG, CRITERIA, Frozen, Said, Seen, between, greedy, select_heads
from fastheads.train.recipe import Recipe

RECIPE = Recipe(batch_size=8)


@pytest.fixture(params=["base", "vit"])
def frozen(request):
    """A patched model on its problem, with text and with a linear head; and the stock one."""
    model = request.getfixturevalue(request.param)
    problem = request.getfixturevalue({"base": "problem", "vit": "vit_problem"}[request.param])
    fit_head(model, problem, RECIPE)
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


def losses(stock, frozen, loader):
    """Of a stock model in float64."""
    other = Frozen.__new__(Frozen)
    other.model, other.problem = stock, frozen.problem
    images, labels = zip(*((images.double(), labels) for images, labels, _ in loader), strict=True)
    with torch.no_grad():
        logits = other.logits(torch.cat(images))
    return F.cross_entropy(logits.double(), torch.cat(labels), reduction="none")


def test_a_closed_head_is_exact_though_the_blocks_below_it_are_not_computed_again(frozen):
    found, stock = frozen
    loader, count = found.loader("blue", range(12)), found.heads[-1][1] + 1
    first, last, middle = found.heads[0], found.heads[-1], found.heads[len(found.heads) // 2]
    more = [first, middle, last]
    said = found.closing(loader, [first], [[head] for head in more[1:]], "")
    alone = found.closing(loader, [], [[head] for head in more], "")
    assert said.right.shape == (3, 12) and torch.equal(said.loss[0], alone.loss[1])
    for row, head in enumerate(more[1:], 1):  # the bits of the whole model with both closed
        assert torch.equal(said.loss[row], found.closing(loader, [first, head], [], "").loss[0])
    both = found.closing(loader, [], [[last, first]], "")
    assert torch.equal(both.loss[1], said.loss[2])
    for row, (layer, head) in enumerate(more, 1):
        expected = losses(scaled(copy.deepcopy(stock), layer, head, 0, count), found, loader)
        torch.testing.assert_close(alone.loss[row].double(), expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(block) for block in found.tower.blocks)


def test_gradients_are_those_in_the_gates(frozen):
    found, stock = frozen
    loader, count, step = found.loader("blue", range(6)), found.heads[-1][1] + 1, 1e-2
    gradients = found.gate_gradients(loader)
    for at in (0, len(found.heads) - 1):
        layer, head = found.heads[at]
        up, down = (
            losses(scaled(copy.deepcopy(stock), layer, head, 1 + s, count), found, loader).mean() for s in (step, -step)
        )
        torch.testing.assert_close(gradients[at].double(), (up - down) / (2 * step), rtol=2e-3, atol=1e-4)


def test_the_mmd_of_a_head_is_that_of_its_tokens(frozen):
    found, _ = frozen
    parts = [found.tokens(found.loader(name, range(6)))[0] for name in ("blue", "green")]
    ids = torch.tensor([0] * 6 + [1] * 6)
    for at in (0, len(found.heads) - 1):
        expected = fastheads.mmd(torch.cat([part[at] for part in parts]).double(), ids, impl="reference")
        torch.testing.assert_close(between(parts)[at].double(), expected, rtol=1e-4, atol=1e-5)


def test_criteria_close_the_head_that_they_are_said_to():
    effects = torch.tensor([[-0.3, -0.1, 0.2], [0.3, -0.1, 0.1]])  # [source, head]: on the loss, when it is closed
    gradients, losses = torch.tensor([[0.9, 0.2, -0.1], [-0.1, 0.2, -0.1]]), torch.tensor([1.0, 2.0])
    said = [Said(torch.ones(4, 5), (o + torch.cat((torch.zeros(1), e)))[:, None].expand(4, 5))
            for o, e in zip(losses, effects, strict=True)]  # fmt: skip
    # Head 0 tells classes apart, of which the sources have other shares; head 1 tells sources apart; head 2 nothing.
    labels, noise = [torch.arange(20) % 5 > 0, torch.arange(20) % 5 == 0], torch.Generator().manual_seed(0)
    tokens = [torch.randn(3, 20, 4, generator=noise) for _ in labels]
    for source, (part, classes) in enumerate(zip(tokens, labels, strict=True)):
        part[0] += 6 * classes[:, None]
        part[1] += 3 * source
    seen = Seen(said, gradients, tokens, [classes.long() for classes in labels])
    scores = {name: score(seen) for name, (_, score) in CRITERIA.items()}
    first = {"loss": 1, "worst-source": 1, "spread": 0, "gradient": 0, "agreement": 1, "class-mmd": 1}
    assert {name: int(scores[name].argmax()) for name in first} == first
    assert min(scores["mmd"][:2]) > 10 * abs(scores["mmd"][2]) and scores["class-mmd"][0] < 0.1 * scores["class-mmd"][1]
    gates = torch.ones(3, requires_grad=True)
    risks = losses + gradients @ (gates - 1)
    (expected,) = torch.autograd.grad(risks.mean() + 10 * risks.var(unbiased=False), gates)
    torch.testing.assert_close(scores["v-rex"], expected)


class Table:
    """A model whose right answers are a sum over its closed heads; of ten images."""

    heads = [(0, 0), (0, 1), (1, 0), (1, 1)]
    gains = {(0, 0): -1, (0, 1): 2, (1, 0): 1, (1, 1): 0}

    def closing(self, loader, closed, sets, doing):
        right = [5 + sum(self.gains[h] for h in (*closed, *own)) for own in ((), *sets)]
        return Said(torch.tensor([[i < n for i in range(10)] for n in right]), torch.zeros(len(right), 10))


@pytest.mark.parametrize(("most", "closed"), [(4, [(0, 1), (1, 0)]), (1, [(0, 1)])])
def test_greedy_closes_what_helps_most_and_stops(most, closed):
    table = Table()
    heads, reached = greedy(table, ["images"], [table.closing(None, (), [[h] for h in table.heads], "")], most, "")
    assert heads == closed and reached == pytest.approx((5 + sum(map(table.gains.get, closed))) / 10)


def test_what_is_chosen_is_tested_on_images_that_nobody_chose_by(vit, vit_problem, monkeypatch):
    fit_head(vit, vit_problem, RECIPE)
    fastheads.patch(vit, CONFIG)
    seen, tried, loader, closing = {}, [], Frozen.loader, Frozen.closing

    def watched(self, domain, indices):
        seen.setdefault(domain, []).append(set(indices))
        return loader(self, domain, indices)

    def heard(self, loader, closed, sets, doing):
        tried.extend(sets if doing.startswith("sets of heads") else ())
        return closing(self, loader, closed, sets, doing)

    monkeypatch.setattr(Frozen, "loader", watched)
    monkeypatch.setattr(Frozen, "closing", heard)
    record = select_heads(vit, vit_problem, RECIPE, most=2, images=3)
    oracle, test = seen["red"]
    assert not oracle & test and len(oracle) == 3 and record["test_images"] == len(test) == 10
    for name in ("blue", "green"):
        (own,) = seen[name]
        assert own <= set(vit_problem.validation[name]) and record["images"][name] == len(own) == 3
    rows = {row["name"]: row for row in record["selections"]}
    assert list(rows) == ["none", *CRITERIA, "random", "oracle", "greedy"]
    for name, row in rows.items():
        assert len(row["heads"]) <= 2 and row["gain"] == pytest.approx(row["target"] - rows["none"]["target"], abs=1e-6)
        assert name == "oracle" or row["sources"] >= rows["none"]["sources"]
    for name in CRITERIA:  # the worst heads first, by the score
        order = [(h["layer"], h["head"]) for h in sorted(record["heads"], key=lambda h: -h["scores"][name])][:2]
        assert tuple(order) in tried and rows[name]["heads"] == list(map(list, order[: len(rows[name]["heads"])]))
